// Package cert keeps the hub's certificates.
//
// The client certificate names the node to the cloud. It is requested with a
// bootstrap token and rotated before it ends, or it is the kubelet's own. Two
// server certificates prove the hub to its callers: one from a certificate
// authority that lives on this node only, so that it never needs the cloud, and
// one that the cluster signed, for pods that trust nothing but the cluster.
//
// What is on disk is used, however old: an expired certificate is kept until a
// new one has been stored, and nothing here waits for the cloud except the very
// first request. Keys never leave the directory and are readable by root only.
package cert
