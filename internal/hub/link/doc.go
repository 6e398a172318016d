// Package link is the hub's one connection to the cloud.
//
// It decides from evidence whether the API servers can be reached, says so
// to the rest of the hub, and carries requests to them: the hub's own through
// [Link.Node] and [Link.Bearer], other clients' through [Link.Forward].
//
// The guarantees:
//   - A request that finds the link down fails at once. One that was on the
//     way when it went down fails then, not after a timeout of TCP.
//   - The link goes down only when a fresh connection could not be made or
//     not be used, never for one failed or slow request.
//   - It comes up only after an API server that holds a certificate of the
//     cluster's CA has answered. A captive portal is not a cloud.
//   - A body that was cut short upstream is cut short for the client too.
//
// The decisions are in state.go, which does no IO and knows no clock. It
// does not decide who may send what, and caches nothing.
package link
