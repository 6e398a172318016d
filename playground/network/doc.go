// Package network builds the playground's network on one Linux host: a WAN
// router, a router per site and a namespace per machine, joined by cables
// that can be cut, narrowed and put behind NAT while the cluster runs.
//
// Everything lives in namespaces whose names start with the plan's prefix,
// except for one link on the host and the routes over it. Up is all or
// nothing and Down finds everything by that prefix, so a crash at any point
// leaves nothing that the next Down does not remove. No setting of the host
// is changed.
//
// All state but that of a running relay is in the kernel: any process may
// Attach to a network that another one made.
package network
