package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// process is what the kernel tells of a process.
type process struct {
	resident, anonymous float64 // MB
	written             float64 // bytes given to the disk
	busy                time.Duration
}

const ticksPerSecond = 100 // USER_HZ, which is fixed for user space

func readProcess(pid int) (process, error) {
	var p process
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	for file, fields := range map[string]map[string]*float64{
		"smaps_rollup": {"Rss": &p.resident, "Anonymous": &p.anonymous},
		"io":           {"write_bytes": &p.written},
	} {
		if err := readFields(filepath.Join(dir, file), fields); err != nil {
			return p, err
		}
	}
	const kb = 1024.0 / 1e6
	p.resident, p.anonymous = p.resident*kb, p.anonymous*kb
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return p, fmt.Errorf("read process: %w", err)
	}
	// The name in parentheses may hold anything; time in user and kernel
	// mode are the 12th and 13th fields after it.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(string(f), 10, 64)
		if err != nil {
			return p, fmt.Errorf("read process: %w", err)
		}
		p.busy += time.Duration(n) * time.Second / ticksPerSecond
	}
	return p, nil
}

// servers are the processes of the direct way.
func servers() ([]int, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, fmt.Errorf("find servers: %w", err)
	}
	var pids []int
	for _, dir := range dirs {
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue // it has ended
		}
		name, rest, _ := strings.Cut(string(stat), ") ")
		if fields := strings.Fields(rest); len(fields) < 2 || fields[1] != strconv.Itoa(os.Getpid()) {
			continue // not a child of ours
		}
		if strings.HasSuffix(name, "(kube-apiserver") || strings.HasSuffix(name, "(etcd") {
			pid, err := strconv.Atoi(filepath.Base(dir))
			if err != nil {
				return nil, fmt.Errorf("find servers: %w", err)
			}
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// busy is the processor time that processes have taken.
func busy(pids ...int) (time.Duration, error) {
	var sum time.Duration
	for _, pid := range pids {
		p, err := readProcess(pid)
		if err != nil {
			return 0, err
		}
		sum += p.busy
	}
	return sum, nil
}

func readFields(file string, wanted map[string]*float64) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("read process: %w", err)
	}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), ":")
		field := wanted[name]
		if field == nil {
			continue
		}
		if *field, err = strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(value, "kB")), 64); err != nil {
			return fmt.Errorf("read %s: %w", file, err)
		}
	}
	return nil
}

// memory adds the hub's resident memory as it stands.
func (b *bench) memory(h *hub, what string, most bar) error {
	p, err := readProcess(h.PID())
	if err != nil {
		return err
	}
	b.hub("resident memory, "+what, "MB", p.resident, most,
		fmt.Sprintf("anonymous %.0f MB, file %.0f MB", p.anonymous, p.resident-p.anonymous))
	return nil
}

// diskUsage is the space that a directory's files take.
func diskUsage(dir string) (float64, error) {
	var sum float64
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			sum += float64(st.Blocks) * 512
		}
		return nil
	})
	return sum, err
}
