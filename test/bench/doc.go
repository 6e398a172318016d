// Command bench measures what a node gets through its hub beside what it
// would get from the API server, in the same run and by the same client, and
// holds the figures against the bars of the design.
//
// A bar is a ratio wherever that is possible, since the machine is never
// quiet: rounds alternate between the two ways, and the ratio is the median
// of the rounds' ratios. Client, hub, API server and etcd share the processors,
// so a ratio here charges the hub for processor time that on a real node the
// API server would not compete for.
package main
