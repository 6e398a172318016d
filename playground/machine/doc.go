// Package machine runs machines on one Linux host: systemd-nspawn containers
// that boot a Debian root with systemd as process 1, each in a network
// namespace made by others, each with its own cgroup, so that it can be
// rebooted in good order or killed at once as by a pulled plug.
//
// What a machine wrote is kept in its directory until that is removed. The
// host's page cache outlives the machine: a power cut here loses what a
// program had not written, never what it had written but not synced.
package machine
