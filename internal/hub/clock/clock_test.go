package clock

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	day  = 24 * time.Hour
	year = 365 * day
)

var (
	built = time.Date(2026, 9, 1, 0, 0, 0, 0, time.UTC)
	today = time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC) // the truth
)

// board is a machine whose clocks the test sets.
type board struct {
	mu   sync.Mutex // guards the following
	wall time.Time
	up   time.Duration
}

func (b *board) read() (time.Time, time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.wall, b.up
}

func (b *board) pass(d time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.wall, b.up = b.wall.Add(d), b.up+d
}

func (b *board) set(wall time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.wall = wall
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func near(t testing.TB, what string, got, want time.Time) {
	t.Helper()
	if d := got.Sub(want); d < -2*time.Second || d > 2*time.Second {
		t.Errorf("%s: got %s, want %s", what, got.UTC(), want.UTC())
	}
}

func open(path string, b *board) *Clock {
	return Open(Config{Path: path, Built: built, Source: b.read, Log: slog.New(slog.DiscardHandler)})
}

// wrong are the clocks of a machine that boots without its battery.
var wrong = map[string]time.Time{
	"1970":            time.Unix(0, 0),
	"two years back":  today.Add(-2 * year),
	"right":           today.Add(-time.Hour),
	"two years ahead": today.Add(2 * year),
}

func TestClocksThatAreWrong(t *testing.T) {
	for name, wall := range wrong {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "clock")
			b := &board{wall: wall}
			c := open(path, b)
			guess := later(wall, built)
			near(t, "first boot", c.Now(), guess)
			b.pass(time.Hour)
			near(t, "an hour later", c.Now(), guess.Add(time.Hour))
			if c.Sound() {
				t.Error("sound before the cloud was heard")
			}

			now := today
			c.Hear(now, time.Second)
			near(t, "cloud heard", c.Now(), now)
			ahead, known := c.Skew()
			if want := wall.Add(time.Hour).Sub(today); !known || (ahead-want).Abs() > 2*time.Second {
				t.Errorf("skew %s, want %s", ahead, want)
			}
			b.pass(day)
			near(t, "a day later", c.Now(), now.Add(day))
			b.set(now.Add(day)) // by hand, or NTP
			near(t, "after the step", c.Now(), now.Add(day))
			if ahead, _ := c.Skew(); ahead != 0 {
				t.Errorf("skew %s once the clock is right", ahead)
			}
			b.set(today.Add(-9 * year)) // and wrong again
			near(t, "after the step back", c.Now(), now.Add(day))
			c.save()

			// The next boot, alone, by each of the clocks.
			for name, wall := range wrong {
				c := open(path, &board{wall: wall})
				near(t, "boot in "+name, c.Now(), later(wall, now.Add(day)))
				near(t, "floor in "+name, c.Floor(), now.Add(day))
			}
		})
	}
}

func TestFloorIsNotPoisoned(t *testing.T) {
	path := filepath.Join(t.TempDir(), "clock")
	b := &board{wall: today.Add(2 * year)}
	synctest.Test(t, func(t *testing.T) {
		c := open(path, b)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- c.Run(ctx) }()
		for range 10 {
			b.pass(day)
			<-time.After(stepPoll)
			synctest.Wait()
		}
		cancel()
		must(t, <-done)
	})
	c := open(path, &board{wall: today})
	near(t, "floor", c.Floor(), built.Add(10*day)) // what ran, and no more
	near(t, "now", c.Now(), today)
}

func TestProofs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "clock")
	b := &board{wall: time.Unix(0, 0)}
	c := open(path, b)
	c.Saw(today)
	near(t, "certificate seen", c.Now(), today)
	c.Saw(today.Add(-day))
	near(t, "older one seen", c.Now(), today)
	// One that the cloud issued while its own clock was ahead.
	c.Saw(today.Add(2 * year))
	c.save()
	near(t, "poisoned", c.Floor(), today.Add(2*year))
	c.Hear(today, 0)
	near(t, "cloud heard", c.Now(), today)
	near(t, "cloud heard", c.Floor(), today)
	near(t, "on disk", open(path, b).Floor(), today)
	c.Saw(today.Add(2 * year))
	near(t, "seen again", c.Floor(), today)
	// What came too slowly says nothing.
	c.Hear(today.Add(-day), tolerance)
	c.Hear(time.Time{}, 0)
	near(t, "slow answer", c.Now(), today)
}

func TestUnusableFile(t *testing.T) {
	for _, text := range []string{"", "{", `{"floor": 7}`, "\x00\x00"} {
		path := filepath.Join(t.TempDir(), "clock")
		must(t, os.WriteFile(path, []byte(text), 0o600))
		c := open(path, &board{wall: today})
		near(t, "now", c.Now(), today)
		near(t, "floor", c.Floor(), built)
		c.Hear(today, 0)
		near(t, "healed", open(path, &board{}).Floor(), today)
	}
	// A disk that is full costs nothing but the floor.
	c := open(filepath.Join(t.TempDir(), "absent", "clock"), &board{wall: today})
	c.Hear(today, 0)
	near(t, "no disk", c.Now(), today)
}

func TestFloorIsSavedSeldom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &board{wall: today}
		c := open(filepath.Join(t.TempDir(), "clock"), b)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- c.Run(ctx) }()
		var last string
		writes := 0
		for range 2 * day / stepPoll {
			b.pass(stepPoll)
			c.Hear(b.wall, 0)
			<-time.After(stepPoll)
			synctest.Wait()
			text, err := os.ReadFile(c.cfg.Path)
			must(t, err)
			if string(text) != last {
				last, writes = string(text), writes+1
			}
		}
		if writes < 2 || writes > 9 {
			t.Errorf("%d writes in two days", writes)
		}
		cancel()
		must(t, <-done)
		near(t, "after a stop", open(c.cfg.Path, b).Floor(), today.Add(2*day))
	})
}

func TestStepIsNoticed(t *testing.T) {
	var log bytes.Buffer
	synctest.Test(t, func(t *testing.T) {
		b := &board{wall: today}
		c := Open(Config{
			Path: filepath.Join(t.TempDir(), "clock"), Source: b.read,
			Log: slog.New(slog.NewTextHandler(&log, nil)),
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- c.Run(ctx) }()
		tick := func() {
			b.pass(stepPoll)
			<-time.After(stepPoll)
			synctest.Wait()
		}
		tick()
		b.pass(time.Hour) // asleep
		tick()
		if log.Len() > 0 {
			t.Errorf("sleep is taken for a step: %s", &log)
		}
		b.set(today.Add(year))
		tick()
		tick()
		cancel()
		must(t, <-done)
	})
	if n := strings.Count(log.String(), "clock was set"); n != 1 {
		t.Errorf("noticed %d times: %s", n, &log)
	}
}

func TestNilIsTheMachinesClock(t *testing.T) {
	var c *Clock
	near(t, "now", c.Now(), time.Now())
	near(t, "floor", c.Floor(), time.Now())
	near(t, "machine", c.Machine(), time.Now())
	c.Hear(today, 0)
	c.Saw(today)
	if _, known := c.Skew(); known || !c.Sound() {
		t.Error("nil has learnt something")
	}
	// The default source is the machine too.
	c = Open(Config{Path: filepath.Join(t.TempDir(), "clock"), Log: slog.New(slog.DiscardHandler)})
	near(t, "now", c.Now(), time.Now())
	boot, up := c.Uptime()
	_, later := c.Uptime()
	if boot == "" || up <= 0 || later < up {
		t.Errorf("boot %q, up %s, then %s", boot, up, later)
	}
}

// issuer signs certificates.
type issuer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func sign(t testing.TB, by *issuer, from, to time.Time) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "x"}, NotBefore: from, NotAfter: to,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	parent, signer := template, key
	if by == nil {
		template.IsCA, template.BasicConstraintsValid, template.ExtKeyUsage = true, true, nil
	} else {
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return cert, key
}

func newIssuer(t testing.TB, from, to time.Time) *issuer {
	i := &issuer{pool: x509.NewCertPool()}
	i.cert, i.key = sign(t, nil, from, to)
	i.pool.AddCert(i.cert)
	return i
}

func TestVerify(t *testing.T) {
	ca := newIssuer(t, today.Add(-year), today.Add(9*year))
	stranger := newIssuer(t, today.Add(-year), today.Add(9*year))
	floor := today.Add(-100 * day) // when the cloud was last heard
	for _, tc := range []struct {
		name     string
		by       *issuer
		from, to time.Duration // relative to today
		wall     time.Time
		heard    bool
		ok       bool
	}{
		{"good", ca, -day, day, today, false, true},
		{"good, heard", ca, -day, day, today, true, true},
		{"expired, heard", ca, -2 * day, -day, today, true, false},
		{"expired since the floor", ca, -200 * day, -day, today, false, true},
		{"expired before the floor", ca, -200 * day, -101 * day, today, false, false},
		{"expired before the floor, clock in 1970", ca, -200 * day, -101 * day, time.Unix(0, 0), false, false},
		{"good, clock two years ahead", ca, -day, day, today.Add(2 * year), false, true},
		{"good, clock two years ahead, heard", ca, -day, day, today.Add(2 * year), true, true},
		{"expired, clock two years ahead, heard", ca, -2 * day, -day, today.Add(2 * year), true, false},
		{"good, clock in 1970", ca, -day, day, time.Unix(0, 0), false, true},
		{"from the future, heard", ca, day, year, today, true, true},
		{"stranger", stranger, -day, day, today, false, false},
		{"stranger, clock two years ahead", stranger, -day, day, today.Add(2 * year), false, false},
		{"stranger, clock in 1970", stranger, -day, day, time.Unix(0, 0), false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := open(filepath.Join(t.TempDir(), "clock"), &board{wall: tc.wall})
			c.floor.at = floor
			if tc.heard {
				c.Hear(today, 0)
			}
			leaf, _ := sign(t, tc.by, today.Add(tc.from), today.Add(tc.to))
			chains, err := c.Verify(leaf, x509.VerifyOptions{Roots: ca.pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
			if (err == nil) != tc.ok || (len(chains) > 0) != tc.ok {
				t.Errorf("got %v", err)
			}
		})
	}
	// An authority that is younger than the floor, as after a rollover.
	young := newIssuer(t, today, today.Add(year))
	c := open(filepath.Join(t.TempDir(), "clock"), &board{wall: time.Unix(0, 0)})
	leaf, _ := sign(t, young, today.Add(-time.Minute), today.Add(day))
	_, err := c.Verify(leaf, x509.VerifyOptions{Roots: young.pool})
	must(t, err)
}

// handshake returns what the client makes of the server's certificate.
func handshake(t *testing.T, cfg *tls.Config, server tls.Certificate) (resumed bool, err error) {
	t.Helper()
	serving := &tls.Config{Certificates: []tls.Certificate{server}, MinVersion: tls.VersionTLS12}
	serving.SetSessionTicketKeys([][32]byte{{1}}) // those of the next handshake too
	listener, err := tls.Listen("tcp", "127.0.0.1:0", serving)
	must(t, err)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer listener.Close()
	wg.Go(func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = conn.Write([]byte("x"))
	})
	conn, err := tls.Dial("tcp", listener.Addr().String(), cfg)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	_, _ = conn.Read(make([]byte, 1)) // the ticket comes before it
	return conn.ConnectionState().DidResume, nil
}

func TestServer(t *testing.T) {
	ca := newIssuer(t, today.Add(-year), today.Add(9*year))
	leaf, key := sign(t, ca, today.Add(-day), today.Add(day))
	pair := tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key}
	b := &board{wall: today.Add(2 * year)}
	c := open(filepath.Join(t.TempDir(), "clock"), b)
	config := func(name string, roots *x509.CertPool) *tls.Config {
		cfg := &tls.Config{ServerName: name, RootCAs: roots, MinVersion: tls.VersionTLS12, ClientSessionCache: tls.NewLRUClientSessionCache(1)}
		c.Server(cfg)
		return cfg
	}
	good := config("127.0.0.1", ca.pool)
	_, err := handshake(t, good, pair)
	must(t, err)
	c.Hear(today, 0)
	resumed, err := handshake(t, good, pair)
	must(t, err)
	if !resumed {
		t.Error("not resumed")
	}
	for name, cfg := range map[string]*tls.Config{
		"other name":     config("127.0.0.2", ca.pool),
		"other roots":    config("127.0.0.1", newIssuer(t, today.Add(-year), today.Add(year)).pool),
		"no roots":       config("127.0.0.1", nil),
		"no roots, name": config("", nil),
	} {
		if _, err := handshake(t, cfg, pair); err == nil {
			t.Errorf("%s: trusted", name)
		} else if _, ok := err.(*tls.CertificateVerificationError); !ok { //nolint:errorlint // as tls returns it
			t.Errorf("%s: got %T", name, err)
		}
	}
	b.pass(2 * day) // now it has expired, for sure
	if _, err := handshake(t, good, pair); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("resumed with an expired certificate: %v", err)
	}
}
