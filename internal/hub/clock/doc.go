// Package clock tells the time on a machine whose own clock may be wrong.
//
// A node without a battery boots in 1970, one with a bad battery anywhere. The
// package therefore keeps a floor on disk, before which it cannot be. Only
// proof raises it: when this program was built, the first moment of a
// certificate that the cluster issued, what the API server says in an answer
// over a verified connection, and the time that has run since. The machine's
// clock is no proof: one that is two years ahead must not make the hub believe
// for ever after that all it has is two years old.
//
// Once the cloud has been heard, its time is the time, and nothing that happens
// to the machine's clock changes it. Until then the later of the machine's
// clock and the floor is the best guess, and Sound is false.
package clock
