// Package dashboard tests the dashboard of the chart against the metrics that
// the hub and the manager have.
package dashboard
