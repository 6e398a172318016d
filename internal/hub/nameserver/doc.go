// Package nameserver answers DNS on a node: names of the cluster from what the
// hub replicates, all others by the node's own name servers.
//
// It follows Services and EndpointSlices as any other client of the hub does.
// So its answers hold while the cloud is away and after a boot alone, lead to
// the pods' own addresses of that boot, and leave out what the hub shows to
// nobody on this node. It keeps names, addresses and ports, and no object.
//
// Names of the cluster are never asked of another server. What other servers
// said is kept within a bound, and given again, though it is old, while they
// are silent.
//
// It does not answer other hosts. It does not validate DNSSEC.
package nameserver
