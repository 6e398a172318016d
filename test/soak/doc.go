// Package soak looks whether a hub stands what a node does to it for months,
// in minutes, and what one bad neighbour does to it at any time. It needs no
// root and no machines: see test/bed.
//
// `make soak` runs it for long; as part of all tests it is short.
package soak
