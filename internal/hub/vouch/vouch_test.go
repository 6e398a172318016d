package vouch

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	mrand "math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/internal/heartbeat"
	"github.com/yurt-edge/yurt/internal/hub/clock"
)

// world is a pool of hubs that reach each other.
type world struct {
	t     *testing.T
	ca    *x509.Certificate
	key   *ecdsa.PrivateKey
	roots *x509.CertPool
	hubs  map[string]*hub
	names []string
}

// hub is one of them. Its clock is the cloud's, once it has heard it, or off by
// skew.
type hub struct {
	*Vouch
	clock  *clock.Clock
	online atomic.Bool
	asked  atomic.Int32 // by peers
	dead   atomic.Bool  // does not answer
	hurry  atomic.Int32 // renewals that were asked for

	mu      sync.Mutex // guards the following
	own     Own
	changed chan struct{}
	helped  chan struct{}
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, roots: x509.NewCertPool(), hubs: map[string]*hub{}}
	var err error
	if w.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-10000 * time.Hour), NotAfter: time.Now().Add(10000 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	w.ca = w.sign(template, template, &w.key.PublicKey)
	w.roots.AddCert(w.ca)
	return w
}

func (w *world) sign(template, parent *x509.Certificate, key *ecdsa.PublicKey) *x509.Certificate {
	w.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key, w.key)
	if err != nil {
		w.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		w.t.Fatal(err)
	}
	return cert
}

func (w *world) add(name string, skew time.Duration, heard bool) *hub {
	w.t.Helper()
	began := time.Now()
	h := &hub{changed: make(chan struct{}), helped: make(chan struct{})}
	h.clock = clock.Open(clock.Config{
		Path: w.t.TempDir() + "/clock", Built: time.Now().Add(-9000 * time.Hour), Log: slog.New(slog.DiscardHandler),
		Source: func() (time.Time, time.Duration) { return time.Now().Add(skew), time.Since(began) },
	})
	if heard {
		h.clock.Hear(time.Now(), 0)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	cert := w.sign(&x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "system:node:" + name, Organization: []string{"system:nodes"}},
		NotBefore: w.ca.NotBefore, NotAfter: w.ca.NotAfter, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, w.ca, &key.PublicKey)
	h.own = Own{UID: "u-1", Ready: "True", Renewed: metav1.NowMicro(), Spoke: time.Now(), Taken: time.Now(), Life: 40 * time.Second}
	h.Vouch = New(Config{
		Node: name, Certificate: func() *tls.Certificate {
			return &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
		},
		ClusterCAs: func() *x509.CertPool { return w.roots }, Clock: h.clock, Online: h.online.Load,
		Changed: func() <-chan struct{} {
			h.mu.Lock()
			defer h.mu.Unlock()
			return h.changed
		},
		Own: func() (Own, error) {
			h.mu.Lock()
			defer h.mu.Unlock()
			return h.own, nil
		},
		From: from, Member: func(node string) bool { return w.hubs[node] != nil },
		Peers: func() []string {
			return slices.DeleteFunc(slices.Clone(w.names), func(n string) bool { return n == name })
		},
		Transport: func(node string) http.RoundTripper { return way{name, w.hubs[node]} },
		Helped: func() <-chan struct{} {
			h.mu.Lock()
			defer h.mu.Unlock()
			return h.helped
		},
		Hurry: func() { h.hurry.Add(1) },
		Path:  "/beats", Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	})
	w.hubs[name] = h
	w.names = append(w.names, name)
	return h
}

type senderKey struct{}

// from is whose hub a request is of.
func from(ctx context.Context) string {
	name, _ := ctx.Value(senderKey{}).(string)
	return name
}

// way leads from a hub to another.
type way struct {
	from string
	to   *hub
}

func (t way) RoundTrip(req *http.Request) (*http.Response, error) {
	t.to.asked.Add(1)
	if t.to.dead.Load() {
		<-req.Context().Done()
		return nil, context.Cause(req.Context())
	}
	rec := httptest.NewRecorder()
	t.to.ServeHTTP(rec, req.WithContext(context.WithValue(req.Context(), senderKey{}, t.from)))
	return rec.Result(), nil
}

// switchLink cuts or heals the link.
func (h *hub) switchLink(up bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.online.Store(up)
	close(h.changed)
	h.changed = make(chan struct{})
}

// renew is what the kubelet does, and the cloud if it takes it.
func (h *hub) renew(taken bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.own.Spoke, h.own.Renewed = time.Now(), metav1.NowMicro()
	if taken {
		h.own.Taken = h.own.Spoke
	}
}

// carries returns for whom a hub speaks.
func (w *world) carries(h *hub) string {
	w.t.Helper()
	var out []string
	for _, s := range h.queue() {
		b, err := s.Open(w.roots, time.Now())
		if err != nil {
			w.t.Error(err)
		}
		if err := b.Fresh(time.Now()); err != nil {
			w.t.Error(err)
		}
		out = append(out, b.Node)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// live passes time, in a bubble, in which all kubelets but those named renew.
func (w *world) live(d time.Duration, but ...string) {
	for range d / (5 * time.Second) {
		<-time.After(5 * time.Second)
		for name, h := range w.hubs {
			if !slices.Contains(but, name) {
				h.renew(h.online.Load())
			}
		}
	}
	synctest.Wait()
}

func (w *world) run() (stop func()) {
	ctx, cancel := context.WithCancel(w.t.Context())
	var wg sync.WaitGroup
	for _, h := range w.hubs {
		wg.Go(func() { _ = h.Run(ctx) })
	}
	return func() { cancel(); wg.Wait() }
}

func TestVouched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a, b, c := w.add("a", 0, true), w.add("b", 0, true), w.add("c", 0, true)
		for _, h := range w.hubs {
			h.online.Store(true)
		}
		defer w.run()()
		w.live(2 * time.Minute)
		if got := w.carries(b) + w.carries(c); got != "" {
			t.Errorf("with all links up %q is carried", got)
		}
		a.switchLink(false)
		c.switchLink(false)
		w.live(time.Minute)
		if got := w.carries(b); got != "a c" {
			t.Errorf("b carries %q", got)
		}
		before := b.asked.Load()
		w.live(2 * time.Minute)
		if n := b.asked.Load() - before; n < 20 || n > 32 {
			t.Errorf("two hubs handed over %d heartbeats in two minutes", n)
		}
		// The kubelet of one dies, the other's link is back.
		w.live(80*time.Second, "a")
		c.switchLink(true)
		w.live(40*time.Second, "a")
		if got := w.carries(b); got != "" {
			t.Errorf("b carries %q after their ends", got)
		}
	})
}

func TestCloudThatTakesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a, b := w.add("a", 0, true), w.add("b", 0, true)
		a.online.Store(true)
		b.online.Store(true)
		defer w.run()()
		w.live(time.Minute)
		for range 8 { // the link is up, and renewals do not get through
			time.Sleep(5 * time.Second)
			a.renew(false)
			b.renew(true)
		}
		synctest.Wait()
		if got := w.carries(b); got != "a" {
			t.Errorf("b carries %q", got)
		}
	})
}

// TestAsksAgainSoon has nobody with a link at first: a hub asks again soon, and
// less often the longer that lasts.
func TestAsksAgainSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a, b := w.add("a", 0, true), w.add("b", 0, true)
		b.cfg.Peers = func() []string { return nil }
		defer w.run()()
		time.Sleep(time.Second)
		b.renew(true)
		b.online.Store(true)
		time.Sleep(again)
		synctest.Wait()
		if got := w.carries(b); got != "a" {
			t.Errorf("%s after its link was back, b carries %q", again, got)
		}
		b.online.Store(false)
		before := b.asked.Load()
		w.live(time.Minute)
		if n := b.asked.Load() - before; n < 6 || n > 9 {
			t.Errorf("in a minute without help b was asked %d times", n)
		}
		// It is told when there is some.
		b.renew(true)
		b.online.Store(true)
		before = b.asked.Load()
		a.mu.Lock()
		close(a.helped)
		a.helped = make(chan struct{})
		a.mu.Unlock()
		time.Sleep(soon)
		synctest.Wait()
		if n := b.asked.Load() - before; n != 1 || a.Carrier() != "b" {
			t.Errorf("asked %d times, carried by %q", n, a.Carrier())
		}
		// Who is carried needs no help.
		a.mu.Lock()
		close(a.helped)
		a.helped = make(chan struct{})
		a.mu.Unlock()
		time.Sleep(soon)
		synctest.Wait()
		if n := b.asked.Load() - before; n != 1 {
			t.Errorf("asked %d times", n)
		}
	})
}

// TestOverdueIsNoticed has the cloud take no renewals though the link is up: the
// peers are asked as soon as one is overdue, not at the next look.
func TestOverdueIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a, b := w.add("a", 0, true), w.add("b", 0, true)
		a.online.Store(true)
		b.online.Store(true)
		defer w.run()()
		time.Sleep(6 * time.Second)
		a.renew(true) // the last one
		b.renew(true)
		time.Sleep(a.own.Life*3/8 - time.Second)
		a.renew(false)
		b.renew(true)
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if got := w.carries(b); got != "a" {
			t.Errorf("b carries %q", got)
		}
	})
}

// TestNewcomersAreHurried: who falls silent does not wait for the carrier's
// kubelet, once.
func TestNewcomersAreHurried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a, b := w.add("a", 0, true), w.add("b", 0, true)
		a.speak(t.Context(), a.own)
		if b.Waits() || b.hurry.Load() != 0 {
			t.Error("a hub without a link hurries")
		}
		b.online.Store(true)
		a.speak(t.Context(), a.own)
		if !b.Waits() || b.hurry.Load() != 1 {
			t.Errorf("%d renewals asked for", b.hurry.Load())
		}
		text, err := heartbeat.Join(b.Turn())
		if err != nil {
			t.Fatal(err)
		}
		b.Took(text)
		for range 3 {
			time.Sleep(10 * time.Second)
			b.renew(true)
			a.speak(t.Context(), a.own)
		}
		if b.Waits() || b.hurry.Load() != 1 {
			t.Errorf("%d renewals asked for", b.hurry.Load())
		}
	})
}

// TestThroughOneWithoutLink has a hub that knows only one peer, whose link is
// down too.
func TestThroughOneWithoutLink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a, b, c := w.add("a", 0, true), w.add("b", 0, true), w.add("c", 0, true)
		a.cfg.Peers = func() []string { return []string{"b"} }
		c.online.Store(true)
		defer w.run()()
		w.live(time.Minute)
		if got := w.carries(c); got != "a b" {
			t.Errorf("c carries %q", got)
		}
		if got := w.carries(b); got != "a" {
			t.Errorf("b keeps %q for when its link is back", got)
		}
	})
}

func TestDeadPeersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.add("a", 0, true)
		for i := range 9 {
			w.add(fmt.Sprint("p", i), 0, true).dead.Store(true)
		}
		start := time.Now()
		a.speak(t.Context(), a.own)
		asked := int32(0)
		for _, h := range w.hubs {
			asked += h.asked.Load()
		}
		if took := time.Since(start); asked != tries || took > tries*patience {
			t.Errorf("%d peers asked in %s", asked, took)
		}
	})
}

func TestWrongClocks(t *testing.T) {
	for _, tc := range []struct {
		name  string
		skew  time.Duration
		heard bool
	}{
		{"years behind, the cloud was heard", -9000 * time.Hour, true},
		{"a day ahead, the cloud was heard", 24 * time.Hour, true},
		{"hours behind, booted alone", -5 * time.Hour, false},
		{"a day ahead, booted alone", 24 * time.Hour, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				a, b := w.add("a", tc.skew, tc.heard), w.add("b", 0, true)
				b.online.Store(true)
				a.speak(t.Context(), a.own)
				if got := w.carries(b); got != "a" {
					t.Errorf("b carries %q", got)
				}
				asked := b.asked.Load()
				a.speak(t.Context(), a.own)
				if n := b.asked.Load() - asked; n != 1 {
					t.Errorf("the next one took %d tries", n)
				}
			})
		})
	}
}

func TestPeerThatLiesAboutTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		heard, alone := w.add("heard", 0, true), w.add("alone", 0, false)
		for _, lie := range []time.Duration{time.Hour, -time.Hour, heartbeat.Good, heartbeat.Good / 4} {
			at := time.Now().Add(lie)
			if heard.correct(&at) {
				t.Errorf("a clock that heard the cloud was set by %s", lie)
			}
		}
		if alone.correct(nil) {
			t.Error("set by a peer that does not know the time")
		}
		at := time.Now().Add(heartbeat.Good / 4)
		if alone.correct(&at) {
			t.Error("set by a peer that refuses for something else")
		}
		at = time.Now().Add(time.Hour)
		if now, told := alone.next(); told || time.Until(now).Abs() > time.Second {
			t.Errorf("told %v: %s", told, now)
		}
		if !alone.correct(&at) {
			t.Error("nobody else knows the time")
		}
		if now, told := alone.next(); !told || now.Sub(at).Abs() > time.Second {
			t.Errorf("told %v: %s, want %s", told, now, at)
		}
		alone.clock.Hear(time.Now(), 0)
		if now, told := alone.next(); told || time.Until(now).Abs() > time.Second {
			t.Errorf("the cloud is heard, told %v: %s", told, now)
		}
	})
}

func TestHandler(t *testing.T) {
	w := newWorld(t)
	a, b := w.add("a", 0, true), w.add("b", 0, true)
	other := newWorld(t).add("a", 0, true)
	sign := func(h *hub, edit func(*Own)) heartbeat.Signed {
		own := h.own
		if edit != nil {
			edit(&own)
		}
		s, err := h.sign(own, "b")
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	post := func(all ...heartbeat.Signed) (int, string) {
		text, err := heartbeat.Join(all)
		if err != nil {
			t.Fatal(err)
		}
		rec, r := httptest.NewRecorder(), httptest.NewRequest(http.MethodPost, "/", strings.NewReader(text))
		b.ServeHTTP(rec, r.WithContext(context.WithValue(r.Context(), senderKey{}, all[0].Claimed().Node)))
		return rec.Code, rec.Body.String()
	}
	stranger := w.add("x", 0, true)
	delete(w.hubs, "x")
	for name, tc := range map[string]struct {
		beat heartbeat.Signed
		want string
	}{
		"of another cluster": {sign(other, nil), `"a":"not signed by the node`},
		"of another pool":    {sign(stranger, nil), `"x":"not a node of this pool"`},
		"of this one":        {sign(b, nil), `{"link":false,"time":`},
	} {
		if code, body := post(tc.beat); code != http.StatusOK || !strings.Contains(body, tc.want) || len(b.queue()) != 0 {
			t.Errorf("%s: got %d %s, carrying %d", name, code, body, len(b.queue()))
		}
	}
	first, second := sign(a, nil), sign(a, nil)
	for _, s := range []heartbeat.Signed{second, first} {
		if code, body := post(s); code != http.StatusOK || strings.Contains(body, "refused") {
			t.Errorf("got %d %s", code, body)
		}
		if all := b.queue(); len(all) != 1 || !bytes.Equal(all[0].Beat, second.Beat) {
			t.Errorf("carrying %v, want the later one", all)
		}
	}
	for _, body := range []string{"{", "null?", strings.Repeat("[", 100)} {
		rec := httptest.NewRecorder()
		b.ServeHTTP(rec, httptest.NewRequest(http.MethodPost, "/", strings.NewReader(body)))
		if rec.Code != http.StatusBadRequest {
			t.Errorf("%q: got %d", body, rec.Code)
		}
	}
	rec := httptest.NewRecorder()
	b.ServeHTTP(rec, httptest.NewRequest(http.MethodPost, "/", io.MultiReader(strings.NewReader("["), broken{})))
	if rec.Code != http.StatusBadRequest {
		t.Errorf("a body that breaks off: got %d", rec.Code)
	}
	alone := w.add("alone", 0, false)
	alone.ahead = time.Second
	bound, err := alone.sign(alone.own, "c")
	if err != nil {
		t.Fatal(err)
	}
	if code, body := post(bound); code != http.StatusOK || !strings.Contains(body, "is for that node to carry") {
		t.Errorf("signed by another's time: got %d %s", code, body)
	}
	// There is room for so many nodes.
	var many []heartbeat.Signed
	for i := range heartbeat.MaxKept + 2 {
		many = append(many, sign(w.add(fmt.Sprint("n", i), 0, true), nil))
	}
	for part := range slices.Chunk(many, heartbeat.MaxCarried) {
		post(part...)
	}
	if n := len(b.queue()); n != heartbeat.MaxKept {
		t.Errorf("vouching for %d nodes", n)
	}
	if n := len(b.Turn()); n != heartbeat.MaxCarried {
		t.Errorf("carrying %d heartbeats", n)
	}
}

// TestSilentNodesStayVouchedFor lets one hub carry for as many as it may, and
// counts by the manager's rule how long the cloud hears nothing of each.
func TestSilentNodesStayVouchedFor(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		silent, lose int // one renewal of so many; 0: none
		most         time.Duration
	}{
		{heartbeat.MaxCarried, 0, 21 * time.Second},
		{heartbeat.MaxCarried + 1, 0, 32 * time.Second}, // a turn too early counts for nothing
		{2 * heartbeat.MaxCarried, 0, 21 * time.Second},
		{heartbeat.MaxKept, 0, 32 * time.Second},
		{heartbeat.MaxKept, 4, 42 * time.Second},
	} {
		t.Run(fmt.Sprint(tc.silent, " silent, 1 lost of ", tc.lose), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				carrier := w.add("carrier", 0, true)
				carrier.online.Store(true)
				for i := range tc.silent {
					w.add(fmt.Sprintf("n%02d", i), 0, true).cfg.Peers = func() []string { return []string{"carrier"} }
				}
				defer w.run()()
				heard := map[string]time.Time{} // by the cloud
				var longest time.Duration
				next := time.Now()
				for i := range 12 {
					next = next.Add(10*time.Second + mrand.N(400*time.Millisecond)) // as kubelets do
					time.Sleep(time.Until(next))
					for _, h := range w.hubs {
						h.renew(h.online.Load())
					}
					if tc.lose > 0 && i%tc.lose == tc.lose-1 {
						_ = carrier.Turn()
						continue
					}
					text, err := heartbeat.Join(carrier.Turn())
					if err != nil {
						t.Fatal(err)
					}
					carrier.Took(text)
					for _, s := range split(t, text) {
						node := s.Claimed().Node
						silence := time.Since(heard[node])
						if !heartbeat.Due(silence, 40*time.Second) {
							continue
						}
						if !heard[node].IsZero() {
							longest = max(longest, silence)
						}
						heard[node] = time.Now()
					}
				}
				for node, last := range heard {
					if silence := time.Since(last); silence > tc.most {
						t.Errorf("%s is silent for %s", node, silence)
					}
				}
				if len(heard) != tc.silent || longest > tc.most {
					t.Errorf("%d nodes are vouched for, the longest silence is %s", len(heard), longest)
				}
			})
		})
	}
}

func split(t *testing.T, text string) []heartbeat.Signed {
	t.Helper()
	all, err := heartbeat.Split(text)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestTurnsAreFair has nodes come and go at random: none that stays waits for
// more than three turns.
func TestTurnsAreFair(t *testing.T) {
	w := newWorld(t)
	v := w.add("carrier", 0, true)
	names := make([]string, 200)
	for i := range names {
		names[i] = fmt.Sprint("n", i)
		w.hubs[names[i]] = nil // a member
		v.cfg.Member = func(string) bool { return true }
	}
	waited := map[string]int{}
	for turn := range 500 {
		for range mrand.IntN(64) {
			name := names[mrand.IntN(len(names))]
			if mrand.IntN(2) == 0 {
				delete(v.kept, name)
				delete(waited, name)
				continue
			}
			b := heartbeat.Beat{Node: name, Time: metav1.NewMicroTime(time.Unix(int64(turn), 0))}
			text, err := json.Marshal(b)
			if err != nil {
				t.Fatal(err)
			}
			_ = v.keep(b, heartbeat.Signed{Beat: text}) // there may be no room
		}
		text, err := heartbeat.Join(v.Turn())
		if err != nil {
			t.Fatal(err)
		}
		for name := range v.kept {
			waited[name]++
		}
		if turn%5 == 0 { // is lost
			for name := range waited {
				waited[name]--
			}
			continue
		}
		v.Took(text)
		for _, s := range split(t, text) {
			waited[s.Claimed().Node] = 0
		}
		for name, turns := range waited {
			if turns >= heartbeat.Turns {
				t.Fatalf("turn %d: %s was left out %d times, of %d", turn, name, turns, len(v.kept))
			}
		}
	}
}

// TestManyWithoutLink hands on more than one message holds.
func TestManyWithoutLink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		middle, end := w.add("middle", 0, true), w.add("end", 0, true)
		end.online.Store(true)
		middle.cfg.Peers = func() []string { return []string{"end"} }
		for i := range heartbeat.MaxKept - 1 {
			w.add(fmt.Sprintf("n%02d", i), 0, true).cfg.Peers = func() []string { return []string{"middle"} }
		}
		defer w.run()()
		w.live(25 * time.Second)
		if n := len(end.Carries()); n != heartbeat.MaxKept {
			t.Errorf("%d of %d are vouched for", n, heartbeat.MaxKept)
		}
	})
}

// TestOneTooMany finds another peer for what the first one has no room for.
func TestOneTooMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		b, c := w.add("b", 0, true), w.add("c", 0, true)
		b.online.Store(true)
		c.online.Store(true)
		for i := range heartbeat.MaxKept + 3 {
			w.add(fmt.Sprintf("n%02d", i), 0, true).cfg.Peers = func() []string { return []string{"b", "c"} }
		}
		defer w.run()()
		w.live(25 * time.Second)
		if nb, nc := len(b.Carries()), len(c.Carries()); nb != heartbeat.MaxKept || nc != 3 {
			t.Errorf("b vouches for %d nodes, c for %d", nb, nc)
		}
	})
}

// TestPeersTimeIsForThatPeer: what a node signs by a peer's word on the time is
// for that peer, and nobody else takes it.
func TestPeersTimeIsForThatPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a, b, c := w.add("a", -5*time.Hour, false), w.add("b", 0, true), w.add("c", 0, true)
		c.online.Store(true)
		a.cfg.Peers = func() []string { return []string{"b"} }
		a.speak(t.Context(), a.own)
		kept := b.queue()
		if len(kept) != 1 || kept[0].Claimed().To != "b" {
			t.Fatalf("b keeps %d", len(kept))
		}
		b.speak(t.Context(), b.own)
		if got := w.carries(c); got != "b" {
			t.Errorf("c carries %q", got)
		}
		a.clock.Hear(time.Now(), 0) // it knows the time itself
		if s, err := a.sign(a.own, "b"); err != nil || s.Claimed().To != "" {
			t.Errorf("signed for %q, %v", s.Claimed().To, err)
		}
	})
}

// TestFloodIsBounded: who delivers too much is refused, and nobody else for it.
func TestFloodIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		b := w.add("b", 0, true)
		deliver := func(peer string) int {
			rec := httptest.NewRecorder()
			r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader("[]"))
			b.ServeHTTP(rec, r.WithContext(context.WithValue(r.Context(), senderKey{}, peer)))
			return rec.Code
		}
		codes := map[int]int{}
		for range 10 * burst {
			codes[deliver("bad")]++
		}
		if codes[http.StatusOK] != burstOfPeer || codes[http.StatusTooManyRequests] != 10*burst-burstOfPeer {
			t.Errorf("one peer: got %v", codes)
		}
		if code := deliver("good"); code != http.StatusOK {
			t.Errorf("another peer: got %d", code)
		}
		time.Sleep(recovery)
		if code := deliver("bad"); code != http.StatusOK {
			t.Errorf("later: got %d", code)
		}
		// All of them together.
		codes = map[int]int{}
		for i := range 2 * burst {
			codes[deliver(fmt.Sprint("p", i))]++
		}
		if codes[http.StatusOK] >= burst+perSecond || codes[http.StatusTooManyRequests] == 0 {
			t.Errorf("many peers: got %v", codes)
		}
		time.Sleep(recovery)
		for i := range maxSenders + 1 {
			deliver(fmt.Sprint("q", i))
		}
		if n := len(b.gate.senders); n > maxSenders {
			t.Errorf("%d peers are remembered", n)
		}
		time.Sleep(recovery)
		if code := deliver("new"); code != http.StatusOK || len(b.gate.senders) != 1 {
			t.Errorf("after that: got %d, %d peers are remembered", code, len(b.gate.senders))
		}
	})
}

// TestOneDeliveryAtATime: a peer whose body does not come holds its own place
// and no more.
func TestOneDeliveryAtATime(t *testing.T) {
	g := newGate()
	leave, err := g.enter("a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.enter("a"); err == nil {
		t.Error("a second one of the same peer")
	}
	other, err := g.enter("b")
	if err != nil {
		t.Errorf("one of another: %v", err)
	}
	leave()
	other()
	if _, err := g.enter("a"); err != nil || g.busy != 1 {
		t.Errorf("the next one: %v, %d under way", err, g.busy)
	}
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, errors.New("broken") }
