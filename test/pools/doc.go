// Package pools tests hubs of one pool against a real API server: whom they
// follow when hubs, links and the ways between them fail, what their local
// watchers see of that, and what a pool costs on its uplink.
package pools
