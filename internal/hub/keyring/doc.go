// Package keyring keeps the key under which a hub's secrets rest on disk.
//
// There are two keys. The data key seals the store and the private keys of
// certificates. It never changes while it is good, and is on disk only wrapped
// by the node key. The node key comes from a source: a TPM, a file, or a
// passphrase. To rotate is to wrap the data key by a new node key, of the same
// source or another one: one small file is replaced, whatever is in the store.
//
// # Guarantees
//
// A ring opens after a crash at any point of a rotation, under the old node
// key or the new one. A key that cannot be had never stops a hub and destroys
// nothing: see Open. Without anybody's word, a ring never moves to a weaker
// source.
//
// # Limits
//
// A running hub holds the data key in memory, so root on the node can have
// it. Rotation gives no safety against somebody who had both the ring and the
// old node key: that is the data key, and only a new ring has a new one.
package keyring
