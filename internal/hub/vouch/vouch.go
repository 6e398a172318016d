// Package vouch lets the hubs of a pool speak for each other: a hub whose
// renewals do not get through hands a signed heartbeat to its peers, and one
// with a link carries the heartbeats of others to the cloud, in its own lease.
package vouch

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/yurt-edge/yurt/internal/heartbeat"
	"github.com/yurt-edge/yurt/internal/httpx"
	"github.com/yurt-edge/yurt/internal/hub/clock"
)

const (
	// beats is how often in the life of its lease a hub that needs it says
	// that its node lives, as often as kubelets do. It is jittered by a fifth.
	beats = 4
	// idle is how often it looks whether it needs it.
	idle = 10 * time.Second
	// again is after how long it asks once more if nobody carries its
	// heartbeat, and twice as long each time after that, up to the usual.
	again = 2 * time.Second
	// soon bounds the pause before the first time after the link went down,
	// so that a pool that is cut does not speak in one voice.
	soon = time.Second
	// patience is how long one peer may take, for all that is handed to it, tries
	// how many are asked, and keepers how many keep it that have no link.
	patience = 3 * time.Second
	tries    = 4
	keepers  = 2
	// held is how long a heartbeat is kept, at most, and no longer than three
	// quarters of the life of a lease. By then there is a newer one.
	held = 30 * time.Second
	// maxAnswer bounds what a peer answers.
	maxAnswer = 32 << 10
)

// Own is what a hub can say of its node.
type Own struct {
	UID   types.UID
	Ready corev1.ConditionStatus
	// Renewed is what the kubelet last wrote into its lease.
	Renewed metav1.MicroTime
	// Spoke is when it did, Taken when the cloud last took it, and Life how
	// long a renewal is good.
	Spoke, Taken time.Time
	Life         time.Duration
}

// alive reports whether the kubelet is.
func (o Own) alive() bool { return o.Life > 0 && time.Since(o.Spoke) < o.Life }

// overdue reports whether the cloud should have taken a renewal by now: then
// the peers are asked, though the link is up.
func (o Own) overdue() bool { return o.due() < 0 }

// due is in how long it will be.
func (o Own) due() time.Duration { return o.Life*3/8 - time.Since(o.Taken) }

// Config is what a Vouch needs. All fields must be set.
type Config struct {
	Node        string
	Certificate func() *tls.Certificate
	ClusterCAs  func() *x509.CertPool
	Clock       *clock.Clock

	// Online and Changed are the link's.
	Online  func() bool
	Changed func() <-chan struct{}
	// Own is asked for each heartbeat.
	Own func() (Own, error)

	// From is the node whose hub a request is of.
	From func(context.Context) string
	// Member reports whether a node is of this one's pool, and Peers are
	// those of them that can be reached by Transport, at URL Path.
	Member    func(node string) bool
	Peers     func() []string
	Transport func(node string) http.RoundTripper
	Path      string
	// Helped is closed when a peer may help that could not before.
	Helped func() <-chan struct{}
	// Hurry asks for a renewal before the next one is due, since a node waits
	// that no renewal has carried. It does not block.
	Hurry func()

	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// Vouch speaks for its node, and for others. Use New. It is safe for
// concurrent use.
type Vouch struct {
	cfg  Config
	sent *prometheus.CounterVec
	gate *gate

	mu      sync.Mutex    // guards the following
	life    time.Duration // of leases; 0: not known yet
	kept    map[string]kept
	last    time.Time     // of the heartbeats that were signed
	ahead   time.Duration // of the clock, as a peer says
	carrier string        // the peer that took the last one
	places  int           // that were given in the queue
}

type kept struct {
	signed heartbeat.Signed
	time   time.Time // of the heartbeat
	at     time.Time // when it came
	place  int       // of the node in the queue to be carried
	fresh  bool      // the cloud has not heard of it from here
}

// New returns a Vouch that carries nothing.
func New(cfg Config) *Vouch {
	v := &Vouch{
		cfg: cfg, kept: map[string]kept{}, gate: newGate(),
		sent: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "node_yurthub_heartbeats_total", Help: "Heartbeats handed to peers while the link was down, by result.",
		}, []string{"result"}),
	}
	cfg.Registerer.MustRegister(v.sent, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "node_yurthub_vouched_nodes", Help: "Nodes of the pool whose heartbeats this hub carries.",
	}, func() float64 { return float64(len(v.Carries())) }))
	return v
}

// Turn returns what the next renewal carries: the heartbeats at the head of the
// queue.
func (v *Vouch) Turn() []heartbeat.Signed {
	all := v.queue()
	return all[:min(len(all), heartbeat.MaxCarried)]
}

// queue returns the heartbeats that are still worth something, those first
// whose nodes wait longest.
func (v *Vouch) queue() []heartbeat.Signed {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.dropLocked()
	nodes := slices.SortedFunc(maps.Keys(v.kept), func(a, b string) int {
		return cmp.Compare(v.kept[a].place, v.kept[b].place)
	})
	all := make([]heartbeat.Signed, len(nodes))
	for i, node := range nodes {
		all[i] = v.kept[node].signed
	}
	return all
}

// Took takes note of the heartbeats in an annotation that the cloud took with
// a renewal: their nodes go to the end of the queue. A renewal that did not get
// through is no turn. So whoever is kept is carried in one of three turns,
// whoever comes and goes.
func (v *Vouch) Took(annotation string) {
	all, err := heartbeat.Split(annotation)
	if err != nil {
		return // not of this hub
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, s := range all {
		node := s.Claimed().Node
		if k, ok := v.kept[node]; ok {
			k.place, k.fresh = v.placeLocked(), false
			v.kept[node] = k
		}
	}
}

// Waits reports whether a node waits to be carried for the first time, by a
// hub that can.
func (v *Vouch) Waits() bool {
	v.mu.Lock()
	v.dropLocked()
	waits := false
	for _, k := range v.kept {
		waits = waits || k.fresh
	}
	v.mu.Unlock()
	return waits && v.carries()
}

func (v *Vouch) dropLocked() {
	most := held
	if v.life > 0 {
		most = min(held, v.life*3/4)
	}
	for node, k := range v.kept {
		if time.Since(k.at) > most {
			delete(v.kept, node)
		}
	}
}

// placeLocked is the end of the queue.
func (v *Vouch) placeLocked() int {
	v.places++
	return v.places
}

// answer is what a hub says to who brought heartbeats.
type answer struct {
	// Link is that it will carry them. It keeps them in any case, for when
	// its link is back.
	Link bool `json:"link"`
	// Time is the cloud's, if the hub knows it.
	Time *time.Time `json:"time,omitempty"`
	// Refused says by node what is wrong with a heartbeat.
	Refused map[string]string `json:"refused,omitempty"`
}

// ServeHTTP takes heartbeats of nodes of the pool: the sender's own, and those
// that it keeps while it has no link.
func (v *Vouch) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	leave, err := v.gate.enter(v.cfg.From(r.Context()))
	if err != nil {
		httpx.WriteStatus(w, r, err)
		return
	}
	defer leave()
	body, err := io.ReadAll(r.Body) // its size is limited
	if err != nil {
		httpx.WriteStatus(w, r, apierrors.NewBadRequest(fmt.Sprintf("read heartbeats: %v", err)))
		return
	}
	all, err := heartbeat.Split(string(body))
	if err != nil {
		httpx.WriteStatus(w, r, apierrors.NewBadRequest(err.Error()))
		return
	}
	a := answer{Link: v.carries(), Refused: map[string]string{}}
	now, heard := v.cfg.Clock.Cloud()
	if heard {
		a.Time = &now
	} else {
		now = v.cfg.Clock.Now()
	}
	for _, s := range all {
		b, err := s.Open(v.cfg.ClusterCAs(), now)
		if err == nil && heard {
			err = b.Fresh(now)
		}
		if err == nil {
			err = v.keep(b, s)
		}
		if err != nil {
			a.Refused[s.Claimed().Node] = err.Error()
		}
	}
	if v.Waits() {
		v.cfg.Hurry()
	}
	text, err := json.Marshal(a)
	if err != nil {
		httpx.WriteStatus(w, r, apierrors.NewInternalError(err))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(text) // who went away asks again
}

func (v *Vouch) keep(b heartbeat.Beat, s heartbeat.Signed) error {
	if b.Node == v.cfg.Node {
		return nil // it came around
	}
	if !v.cfg.Member(b.Node) {
		return errors.New("not a node of this pool")
	}
	if err := b.For(v.cfg.Node); err != nil {
		return err //nolint:wrapcheck // it says all
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.dropLocked()
	k, known := v.kept[b.Node]
	if known && !b.Time.After(k.time) {
		return nil
	}
	if !known && len(v.kept) >= heartbeat.MaxKept {
		return fmt.Errorf("this hub vouches for %d nodes already", heartbeat.MaxKept)
	}
	if !known {
		k.place = v.placeLocked()
	}
	v.kept[b.Node] = kept{s, b.Time.Time, time.Now(), k.place, k.fresh || !known}
	return nil
}

// Run speaks for the node while its renewals do not get through, until ctx
// ends. It returns nil.
func (v *Vouch) Run(ctx context.Context) error {
	retry := again
	for {
		changed, helped, pause := v.cfg.Changed(), v.cfg.Helped(), idle
		carried := true // or there is no need
		if own, err := v.cfg.Own(); err != nil {
			v.cfg.Log.Debug("nothing to say of the node", "err", err)
		} else if own.alive() {
			pause = min(idle, own.Life/beats)
			v.expect(own.Life)
			if !v.cfg.Online() || own.overdue() {
				carried = v.speak(ctx, own)
			} else {
				pause = min(pause, max(time.Second, own.due()))
			}
		}
		if carried {
			helped, retry = nil, again
		} else {
			pause = min(pause, retry)
			retry = min(2*retry, idle)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause*9/10 + rand.N(pause/5)):
			continue
		case <-changed:
		case <-helped:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(rand.N(soon)):
		}
	}
}

// expect takes the life of leases: the nodes of a pool are alike.
func (v *Vouch) expect(life time.Duration) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.life = life
}

// carries reports whether what this hub keeps is on its way to the cloud: with
// the renewals of a kubelet that lives, which the cloud takes.
func (v *Vouch) carries() bool {
	own, err := v.cfg.Own()
	return err == nil && v.cfg.Online() && own.alive() && !own.overdue()
}

// speak hands the node's heartbeat to peers until one carries it, and reports
// whether one does.
func (v *Vouch) speak(ctx context.Context, own Own) bool {
	kept := 0
	for i, peer := range v.order() {
		a, err := v.tell(ctx, peer, own)
		if err == nil && a.Refused[v.cfg.Node] != "" && v.correct(a.Time) {
			a, err = v.tell(ctx, peer, own)
		}
		result := "link"
		switch {
		case err != nil:
			result = "failed"
			v.cfg.Log.Debug("heartbeat not handed to a peer", "peer", peer, "err", err)
		case a.Refused[v.cfg.Node] != "":
			result = "refused"
			v.cfg.Log.Warn("a peer does not vouch for this node", "peer", peer, "why", a.Refused[v.cfg.Node])
		case !a.Link:
			result = "kept"
			kept++
		}
		v.sent.WithLabelValues(result).Inc()
		if result == "link" {
			v.carriedBy(peer)
			return true
		}
		if ctx.Err() != nil || i == tries-1 || kept == keepers {
			break
		}
	}
	v.carriedBy("")
	return false
}

func (v *Vouch) carriedBy(peer string) {
	v.mu.Lock()
	before := v.carrier
	v.carrier = peer
	v.mu.Unlock()
	switch {
	case before == peer:
	case peer == "":
		v.cfg.Log.Info("no peer with a link vouches for this node")
	default:
		v.cfg.Log.Info("a peer vouches for this node", "peer", peer)
	}
}

// order is the peers as they are asked: who took the last heartbeat first, the
// others as Peers has them.
func (v *Vouch) order() []string {
	peers := slices.Clone(v.cfg.Peers())
	v.mu.Lock()
	defer v.mu.Unlock()
	slices.SortStableFunc(peers, func(a, b string) int {
		if a != b && (a == v.carrier || b == v.carrier) {
			return map[bool]int{true: -1, false: 1}[a == v.carrier]
		}
		return 0
	})
	return peers
}

// tell sends the node's heartbeat and, while nothing can be carried here, those
// of others that are kept.
func (v *Vouch) tell(ctx context.Context, peer string, own Own) (answer, error) {
	signed, err := v.sign(own, peer)
	if err != nil {
		return answer{}, err
	}
	all := []heartbeat.Signed{signed}
	if !v.cfg.Online() {
		for _, s := range v.queue() {
			if s.Claimed().For(peer) == nil {
				all = append(all, s)
			}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var first *answer // which judges the node's own
	for part := range slices.Chunk(all, heartbeat.MaxCarried) {
		a, err := v.post(ctx, peer, part)
		if err != nil {
			return answer{}, err
		}
		if first == nil {
			first = &a
		}
		if first.Refused[v.cfg.Node] != "" {
			break // it is told again
		}
	}
	return *first, nil
}

// post sends at most MaxCarried heartbeats.
func (v *Vouch) post(ctx context.Context, peer string, part []heartbeat.Signed) (answer, error) {
	var a answer
	text, err := heartbeat.Join(part)
	if err != nil {
		return a, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+peer+v.cfg.Path, strings.NewReader(text))
	if err != nil {
		return a, fmt.Errorf("hand over heartbeat: %w", err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := v.cfg.Transport(peer).RoundTrip(req)
	if err != nil {
		return a, fmt.Errorf("hand over heartbeat: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return a, fmt.Errorf("hand over heartbeat: read answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return a, fmt.Errorf("hand over heartbeat: %s: %s", resp.Status, bytes.TrimSpace(body))
	}
	if err := json.Unmarshal(body, &a); err != nil {
		return a, fmt.Errorf("hand over heartbeat: read answer: %w", err)
	}
	return a, nil
}

// sign signs for a peer. If the time is a peer's it is for that one only: one
// that lies about the time gets nothing that another could use later.
func (v *Vouch) sign(own Own, peer string) (heartbeat.Signed, error) {
	pair := v.cfg.Certificate()
	if pair == nil {
		return heartbeat.Signed{}, errors.New("sign heartbeat: the hub has no certificate yet")
	}
	key, ok := pair.PrivateKey.(crypto.Signer)
	if !ok {
		return heartbeat.Signed{}, fmt.Errorf("sign heartbeat: a key of type %T signs nothing", pair.PrivateKey)
	}
	now, told := v.next()
	b := heartbeat.Beat{Node: v.cfg.Node, UID: own.UID, Time: metav1.NewMicroTime(now), Renewed: own.Renewed, Ready: own.Ready}
	if told {
		b.To = peer
	}
	return heartbeat.Sign(b, pair.Certificate, key)
}

// next returns the time of a heartbeat, later than that of the one before, and
// whether a peer told it.
func (v *Vouch) next() (now time.Time, told bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	now, told = v.timeLocked()
	now = now.Truncate(time.Microsecond)
	if !now.After(v.last) && v.last.Sub(now) < heartbeat.Good {
		now = v.last.Add(time.Microsecond)
	}
	v.last = now
	return now, told
}

// timeLocked is the cloud's time if it was heard. Else it is the machine's, put
// right by a peer if need be: that is told.
func (v *Vouch) timeLocked() (now time.Time, told bool) {
	if now, heard := v.cfg.Clock.Cloud(); heard {
		return now, false
	}
	return v.cfg.Clock.Now().Add(-v.ahead), v.ahead != 0
}

// correct takes the time of a peer that refused a heartbeat, if this hub has not
// heard the cloud's and the time can be why. It reports whether it did.
func (v *Vouch) correct(t *time.Time) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, heard := v.cfg.Clock.Cloud(); heard || t == nil {
		return false
	}
	now, _ := v.timeLocked()
	off := now.Sub(*t)
	if off.Abs() < heartbeat.Good/2 {
		return false // it was refused for something else
	}
	v.ahead += off
	return true
}
