// Package e2e runs scenarios on a playground of real machines: incident
// reports as scripts, in testdata.
package e2e
