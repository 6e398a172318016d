package link

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

var rewrite = flag.Bool("rewrite", false, "write what the scenarios print as what they must print")

// TestStateScenarios plays testdata/state: each line is a time since the
// start and an event, and what follows "->" is what came of it.
//
//	0s   start 0            a probe of server 0 sets out
//	10ms alive 0 since=0s   it found the server alive; it set out at 0s
//	20ms reached 0 since=0s it has connected and waits, answered 0: no more
//	3s   suspect 0          a request failed or waits
//	3s   hear 0             bytes came in
func TestStateScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/state/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := play(t, want)
			if *rewrite {
				if err := os.WriteFile(file, got, 0o600); err != nil {
					t.Fatal(err)
				}
				return
			}
			if !bytes.Equal(got, want) {
				t.Errorf("got:\n%s\nwant:\n%s", got, want)
			}
		})
	}
}

func play(t *testing.T, script []byte) []byte {
	t.Helper()
	zero := time.Unix(0, 0)
	servers := 1
	if bytes.Contains(script, []byte("two servers")) {
		servers = 2
	}
	tr := newTracker(servers, Budgets{}.withDefaults(), zero)
	var out strings.Builder
	for line := range strings.Lines(string(script)) {
		line, _, _ = strings.Cut(strings.TrimRight(line, "\n"), "->")
		line = strings.TrimRight(line, " ")
		if line == "" || line[0] == '#' {
			fmt.Fprintln(&out, line)
			continue
		}
		f := strings.Fields(line)
		at, err := time.ParseDuration(f[0])
		if err != nil || len(f) < 3 {
			t.Fatalf("bad line %q: %v", line, err)
		}
		now := zero.Add(at)
		i, err := strconv.Atoi(f[2])
		if err != nil {
			t.Fatalf("bad line %q: %v", line, err)
		}
		args := map[string]time.Duration{"since": at}
		for _, arg := range f[3:] {
			k, v, _ := strings.Cut(arg, "=")
			if args[k], err = time.ParseDuration(v); err != nil {
				t.Fatalf("bad line %q: %v", line, err)
			}
		}
		result := ""
		switch f[1] {
		case "start":
			connect, answer := tr.start(i, now, 1)
			result = fmt.Sprintf("within %s+%s, ", connect, answer)
		case "suspect":
			result = fmt.Sprintf("wake %v, ", tr.suspect(i, now))
		case "hear":
			tr.hear(i, now)
		case "reached":
			tr.reached(i, zero.Add(args["since"]))
		case "answered":
			tr.answered(i)
		case "alive", "unready", "unwell", "stranger", "silence":
			v := map[string]verdict{"alive": alive, "unready": unready, "unwell": unwell, "stranger": stranger, "silence": silence}[f[1]]
			if tr.report(i, zero.Add(args["since"]), now, finding{v, args["connect"], args["answer"], f[1]}) {
				result = "turned, "
			}
		default:
			t.Fatalf("bad line %q", line)
		}
		side := "down"
		if tr.state.Up {
			side = "up"
		}
		if tr.servers[i].suspected {
			side += ", in doubt,"
		}
		fmt.Fprintf(&out, "%-34s -> %s%s since %s, next probe at %s\n", line, result,
			side, tr.state.Since.Sub(zero), tr.servers[i].due.Sub(zero))
	}
	return []byte(out.String())
}

// TestHandshakesBridgeAWhile: bytes of handshakes keep a server in mind that was
// heard of late, and no longer.
func TestHandshakesBridgeAWhile(t *testing.T) {
	var s target
	for _, tc := range []struct {
		at     time.Duration
		proven bool
		heard  time.Duration
	}{
		{10 * time.Second, true, 10 * time.Second},
		{20 * time.Second, false, 20 * time.Second},
		{34 * time.Second, false, 34 * time.Second},
		{35 * time.Second, false, 34 * time.Second},
		{time.Minute, false, 34 * time.Second},
		{2 * time.Minute, true, 2 * time.Minute},
	} {
		s.hear(tc.at, tc.proven, 24*time.Second)
		if got := time.Duration(s.heard.Load()); got != tc.heard {
			t.Errorf("bytes at %s, proven %v: heard at %s, want %s", tc.at, tc.proven, got, tc.heard)
		}
	}
}
