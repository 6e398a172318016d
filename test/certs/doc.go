// Package certs tries the hub's certificates and its notion of time against a
// real API server: renewals, a change of the cluster's authority, certificates
// that end during a cut, clocks that are wrong. Through all of it clients on
// the node watch, and must see each change once, in order, by the same watch.
package certs
