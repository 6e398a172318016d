package machine

// Files returns what every machine needs beside its workload's files: rights
// on its own cgroups, a quiet console and no services that only cost.
func Files() map[string]File {
	files := map[string]File{
		"/usr/local/sbin/cgroups-writable": {Mode: 0o755, Data: []byte(cgroupsWritable)},
		"/etc/systemd/system/cgroups-writable.service": {Data: []byte(`[Unit]
Description=Let services manage cgroups
DefaultDependencies=no
After=local-fs.target
Before=sysinit.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/local/sbin/cgroups-writable
`)},
		"/etc/systemd/system/sysinit.target.wants/cgroups-writable.service": {Link: "/etc/systemd/system/cgroups-writable.service"},
		"/etc/systemd/journald.conf.d/small.conf":                           {Data: []byte("[Journal]\nStorage=persistent\nSystemMaxUse=64M\n")},
		"/etc/resolv.conf": {Data: []byte("# no name server: machines know each other by address\n")},
	}
	for _, unit := range []string{
		"console-getty.service", "getty.target", "systemd-networkd.service", "systemd-resolved.service",
		"apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer",
		// These would change the settings of the host's kernel.
		"systemd-sysctl.service", "systemd-modules-load.service",
		"systemd-timesyncd.service", "systemd-udevd.service", "systemd-logind.service", "systemd-ask-password-wall.path",
	} {
		files["/etc/systemd/system/"+unit] = File{Link: "/dev/null"}
	}
	return files
}

// cgroupsWritable undoes nspawn's read-only mounts of the v1 controllers. On
// a v2 host the machine's own tree is writable as it is. Before that it lets
// files stand in for those settings of the host's kernel that a kubelet would
// change.
const cgroupsWritable = `#!/bin/sh
set -e
mkdir -p /run/yurt/sysctl
while read -r key value; do
	[ -e /proc/sys/$key ] || continue
	file=/run/yurt/sysctl/$(echo $key | tr / .)
	echo $value > $file
	mount --bind $file /proc/sys/$key
done <<END
vm/overcommit_memory 1
vm/panic_on_oom 0
kernel/panic 10
kernel/panic_on_oops 1
kernel/keys/root_maxkeys 1000000
kernel/keys/root_maxbytes 25000000
END
[ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ] && exit 0
mount -o remount,rw /sys/fs/cgroup
for c in /sys/fs/cgroup/*/; do
	mount -o remount,rw,bind "$c" || true
done
`
