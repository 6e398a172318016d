// Package identity answers two questions for the hub's listeners: who is
// calling, and what may that caller read.
//
// [Authenticator] turns a request into a [Caller] by its client certificate or
// bearer token; [Authorizer] decides what the Caller may do. While the cloud is
// reachable the cloud decides both, through TokenReview and
// SubjectAccessReview, and its answers are kept for a short time. While it is
// not, tokens are verified by the cluster's published signing keys and rights
// are those that the cloud last stated. The guarantee: a caller never has more
// than the cloud gave it when last asked, and what was never asked is denied.
//
// The package uses the hub's own credential only to ask these questions. It
// never performs or authorises anything in the hub's name.
package identity
