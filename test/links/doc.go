// Package links holds tests of a hub behind bad links, which a loop of the
// playground's network makes out of real packets. They need root.
package links
