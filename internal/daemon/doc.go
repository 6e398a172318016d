// Package daemon holds what every main of Yurt shares: the logger, the
// context that ends with a signal, the group that runs a process's parts, the
// messages to systemd and the build's version.
//
// It decides nothing about a part and imports none. A main reads its flags,
// calls NewLogger and SignalContext, and passes both to one part's Run.
package daemon
