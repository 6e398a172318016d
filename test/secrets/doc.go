// Package secrets sends secrets through a hub in every way that a node has,
// and then looks for them in every byte that the hub left: on its disk, in its
// log and in what it told systemd. Its tests are the package.
package secrets
