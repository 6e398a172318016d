// Package conform asks a real API server and a hub the same and compares what
// they say. Its tests are the package; the API server is the judge.
//
// Where the two may differ is written down where it is compared: the resource
// version of a list from the replica, which is the replica's own, and the
// message of an error, where the hub has more to say.
package conform
