package condition

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/internal/report"
)

// The conditions that a hub keeps on its Node. True is good, for all of them,
// as it is for Ready.
const (
	// Link says whether the cloud can be reached.
	Link = "YurtHubLinkReady"
	// Store says whether the hub can keep what it is told.
	Store = "YurtHubStoreReady"
	// Certificate says whether the hub can prove who it is, and for how long.
	Certificate = "YurtHubCertificateReady"
	// Clock says whether the node's time is right.
	Clock = "YurtHubClockReady"
	// Journal says whether writes reach the cloud, or wait for it in safety.
	Journal = "YurtHubJournalReady"
	// Autonomy is OpenYurt's: whether the node would come back alone from a
	// power cut right now. It is Unknown while the store fails, as there.
	Autonomy = "Autonomy"

	// prefix is that of all our types but Autonomy.
	prefix = "YurtHub"
)

const (
	// soon is the part of a certificate's life at whose end it should have
	// been renewed long ago.
	soon = 0.1
	// skewMost is how wrong a clock may be before it is said. The cloud backs
	// its certificates' dates by five minutes.
	skewMost = 2 * time.Minute
	// stuckAfter is how long the journal may need after the link's return.
	stuckAfter = 5 * time.Minute
)

// Facts is what a hub knows of itself at one moment.
type Facts struct {
	Link        LinkFacts
	Store       StoreFacts
	Certificate CertificateFacts
	Clock       ClockFacts
	Journal     JournalFacts
	// Missing is what the node needs to run its pods and is not on the disk.
	Missing []string
}

// LinkFacts is the state of the link and the last cut that is over.
type LinkFacts struct {
	Up     bool
	Since  time.Time
	Reason string
	Last   *report.Cut
}

// StoreFacts is the state of the store.
type StoreFacts struct {
	Err     string // why it cannot be written or read; empty if it can
	Full    bool   // Err is that the disk is full
	Damaged int64  // values set aside since the start
	Key     string // why the key of this run is in memory only; empty if it is not
	KeyLost bool   // its key was lost at the start, and it was begun anew
	Rebuilt bool   // it was unusable at the start, and begun anew
	Dir     string
}

// CertificateFacts is the state of the hub's client certificate.
type CertificateFacts struct {
	NotBefore, NotAfter time.Time // zero: there is none
	// Stuck is why it cannot be renewed, empty if nothing is known to be in
	// the way, and Remedy what an operator must do.
	Stuck, Remedy string
}

// ClockFacts is what comparison with the cloud has shown.
type ClockFacts struct {
	Known bool
	Skew  time.Duration // ahead of the cloud if positive
}

// JournalFacts is what waits for the cloud.
type JournalFacts struct {
	Status, Events int
	Oldest         time.Time // when the first of them was made
	Dropped        int       // events that made place for newer ones of these
}

// Plan returns what the facts mean, one condition per type in a fixed order.
// Since is set where the facts tell it.
func Plan(f Facts, now time.Time) []report.Condition {
	return []report.Condition{
		planLink(f.Link), planStore(f), planCertificate(f.Certificate, now),
		planClock(f.Clock), planJournal(f, now), planAutonomy(f),
	}
}

const runDoctor = "`yurtadm doctor` on the node names the failing hop"

func planLink(l LinkFacts) report.Condition {
	c := report.Condition{Type: Link, Status: report.True, Reason: "LinkUp", Since: l.Since, Message: answers}
	switch {
	case !l.Up:
		c.Status, c.Reason = report.False, HowCut(l.Reason)
		c.Message = fmt.Sprintf("the cloud cannot be reached since %s: %s; %s", stamp(l.Since), l.Reason, runDoctor)
	case l.Last != nil:
		c.Message = again(*l.Last)
	}
	return c
}

const answers = "the cloud answers"

func again(cut report.Cut) string {
	return fmt.Sprintf("the cloud answers again since %s, after %s without (%s)",
		stamp(cut.To), cut.To.Sub(cut.From).Round(time.Second), cut.How)
}

// HowCut makes one word of the link's reason, which is for people.
func HowCut(reason string) string {
	for _, w := range []struct{ text, word string }{
		{"certificate", "NotTheCloud"},
		{"tls: first record", "NotTheCloud"},
		{"not like an API server", "NotTheCloud"},
		{"not ready:", "CloudNotReady"},
		{"connection refused", "Refused"},
		{"connection reset", "Reset"},
		{"unreachable", "Unreachable"},
		{"no route", "Unreachable"},
		{"no such host", "NameNotFound"},
		{"lookup ", "NameNotFound"},
		{"timeout", "Silent"},
		{"deadline exceeded", "Silent"},
		{"no answer", "Silent"},
	} {
		if strings.Contains(reason, w.text) {
			return w.word
		}
	}
	return "LinkDown"
}

func planStore(f Facts) report.Condition {
	s := f.Store
	c := report.Condition{Type: Store, Status: report.True, Reason: "Healthy", Message: "what the hub is told is on the disk"}
	switch {
	case s.Full:
		c.Status, c.Reason = report.False, "DiskFull"
		c.Message = fmt.Sprintf("the disk of %s is full: nothing more can be kept; free some space (`df -h %s`), the hub goes on by itself", s.Dir, s.Dir)
	case s.Err != "":
		c.Status, c.Reason = report.False, "WriteFailed"
		c.Message = fmt.Sprintf("the store in %s fails: %s; look at the disk (`dmesg`), then `systemctl restart yurthub`", s.Dir, s.Err)
	case s.Key != "":
		c.Status, c.Reason = report.False, "KeyNotKept"
		c.Message = fmt.Sprintf("the key of the store in %s is in memory only, and what is stored is lost with the next start: %s", s.Dir, s.Key)
	case s.KeyLost && len(f.Missing) > 0:
		c.Status, c.Reason = report.False, "KeyLost"
		c.Message = fmt.Sprintf("the key of the store in %s is lost (`journalctl -u yurthub` says why) and the store is begun anew; it fills when the cloud is in reach: keep the node powered until then", s.Dir)
	case s.KeyLost:
		c.Reason = "KeyLost"
		c.Message = fmt.Sprintf("the key of the store was lost, the store is begun anew and filled again; what the old key sealed is kept in %s as *.lost", s.Dir)
	case s.Rebuilt && len(f.Missing) > 0:
		c.Status, c.Reason = report.False, "Rebuilt"
		c.Message = fmt.Sprintf("the store in %s was unusable and is begun anew; it fills when the cloud is in reach: keep the node powered until then", s.Dir)
	case s.Rebuilt:
		c.Reason = "Rebuilt"
		c.Message = fmt.Sprintf("the store was unusable, is begun anew and filled again; the old one is kept in %s for a person to look at", s.Dir)
	case s.Damaged > 0 && !f.Link.Up:
		c.Status, c.Reason = report.False, "Damaged"
		c.Message = fmt.Sprintf("damaged objects in %s were set aside and are missing until the cloud is in reach; look at the disk (`dmesg`)", s.Dir)
	case s.Damaged > 0:
		c.Reason = "Mended"
		c.Message = fmt.Sprintf("damaged objects in %s were set aside and fetched again; look at the disk (`dmesg`)", s.Dir)
	}
	return c
}

func planCertificate(f CertificateFacts, now time.Time) report.Condition {
	c := report.Condition{Type: Certificate, Status: report.True, Reason: "Valid"}
	remedy := ""
	if f.Remedy != "" {
		remedy = "; " + f.Remedy
	}
	left := f.NotAfter.Sub(now)
	switch {
	case f.NotAfter.IsZero():
		c.Status, c.Reason, c.Message = report.False, "Missing", "the hub has no client certificate yet"+remedy
	case left <= 0:
		c.Status, c.Reason, c.Since = report.False, "Expired", f.NotAfter
		c.Message = "the hub's client certificate expired on " + stamp(f.NotAfter) + remedy
	case now.Before(f.NotBefore):
		c.Status, c.Reason = report.False, "NotYetValid"
		c.Message = "the hub's client certificate is valid from " + stamp(f.NotBefore) + " on: the node's clock is behind; set it (`timedatectl`)"
	case f.Stuck != "":
		c.Status, c.Reason = report.False, "CannotRenew"
		c.Message = fmt.Sprintf("the hub's client certificate expires on %s and cannot be renewed: %s%s", stamp(f.NotAfter), f.Stuck, remedy)
	case float64(left) < soon*float64(f.NotAfter.Sub(f.NotBefore)):
		c.Reason = "ExpiresSoon"
		c.Message = "the hub's client certificate expires on " + stamp(f.NotAfter) + "; bring the link back before" + remedy
	default:
		c.Message = "valid until " + stamp(f.NotAfter)
	}
	return c
}

func planClock(f ClockFacts) report.Condition {
	c := report.Condition{Type: Clock, Status: report.True, Reason: "Agrees", Message: "the node's clock agrees with the cloud's"}
	switch {
	case !f.Known:
		c.Status, c.Reason, c.Message = report.Unknown, "NotCompared", "the node's clock was not compared with the cloud's since the hub started"
	case f.Skew.Abs() > skewMost:
		way := "ahead of"
		if f.Skew < 0 {
			way = "behind"
		}
		c.Status, c.Reason = report.False, "Skewed"
		c.Message = fmt.Sprintf("the node's clock is %s %s the cloud's; set it (`timedatectl`) and keep it by NTP", f.Skew.Abs().Round(time.Second), way)
	}
	return c
}

func planJournal(f Facts, now time.Time) report.Condition {
	j := f.Journal
	c := report.Condition{Type: Journal, Status: report.True, Reason: "Empty", Message: "no write waits for the cloud"}
	waiting := fmt.Sprintf("%s and %s wait for the cloud, the oldest since %s", count(j.Status, "status write"), count(j.Events, "event"), stamp(j.Oldest))
	switch {
	case j.Status+j.Events == 0:
	case f.Link.Up && now.Sub(f.Link.Since) > stuckAfter:
		c.Status, c.Reason = report.False, "Stuck"
		c.Message = waiting + ", though it answers; `journalctl -u yurthub` says what it refuses"
	case j.Dropped > 0:
		c.Status, c.Reason = report.False, "Dropping"
		c.Message = waiting + "; older events were dropped for want of room, and more will be until the link is back: " + runDoctor
	default:
		c.Reason = "Waiting"
		c.Message = waiting + "; they are on the disk"
	}
	return c
}

// count is in steps, so that a message does not change with each write.
func count(n int, what string) string {
	for _, step := range []int{1000, 100, 10} {
		if n >= step {
			return fmt.Sprintf("more than %d %ss", step-1, what)
		}
	}
	switch n {
	case 0:
		return "no " + what
	case 1:
		return "1 " + what
	}
	return "some " + what + "s"
}

func planAutonomy(f Facts) report.Condition {
	c := report.Condition{Type: Autonomy, Status: report.True, Reason: "Held", Message: "what the node needs to run its pods without the cloud is on its disk"}
	switch {
	case f.Store.Err != "":
		c.Status, c.Reason, c.Message = report.Unknown, "StoreFailed", "the store fails, see "+Store
	case len(f.Missing) > 0:
		c.Status, c.Reason = report.False, "NotHeld"
		c.Message = fmt.Sprintf("not on the node's disk yet: %s; after a power cut its pods would wait for the cloud", strings.Join(f.Missing, ", "))
	}
	return c
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// ours reports whether a condition of a Node is a hub's, of this version or
// another.
func ours(typ corev1.NodeConditionType) bool {
	return typ == Autonomy || strings.HasPrefix(string(typ), prefix)
}

// change is one condition that differs from what its Node says.
type change struct {
	want report.Condition
	have *corev1.NodeCondition // nil: it is new
}

// turned says that the status or the reason is another, not the words alone.
func (c change) turned() bool {
	return c.have == nil || string(c.have.Status) != c.want.Status || c.have.Reason != c.want.Reason
}

// differ returns what must be written to bring have to want: conditions that
// are missing or say something else, and the types of a hub that are there
// and should not be. The words of a condition that is good are not worth a
// write.
func differ(want []report.Condition, have []corev1.NodeCondition) (changes []change, gone []corev1.NodeConditionType) {
	for _, w := range want {
		i := slices.IndexFunc(have, func(h corev1.NodeCondition) bool { return string(h.Type) == w.Type })
		if i < 0 {
			changes = append(changes, change{want: w})
			continue
		}
		c := change{w, &have[i]}
		if c.turned() || w.Status != report.True && w.Message != have[i].Message {
			changes = append(changes, c)
		}
	}
	for _, h := range have {
		known := slices.ContainsFunc(want, func(w report.Condition) bool { return w.Type == string(h.Type) })
		if ours(h.Type) && !known {
			gone = append(gone, h.Type)
		}
	}
	return changes, gone
}

// node is the condition as the Node has it. The time of the transition is
// kept while the status is: it is the facts' own where they know it, and never
// of the future.
func (c change) node(now time.Time) corev1.NodeCondition {
	since := now
	switch {
	case c.have != nil && string(c.have.Status) == c.want.Status:
		since = c.have.LastTransitionTime.Time
	case !c.want.Since.IsZero() && c.want.Since.Before(now):
		since = c.want.Since
	}
	return corev1.NodeCondition{
		Type: corev1.NodeConditionType(c.want.Type), Status: corev1.ConditionStatus(c.want.Status),
		Reason: c.want.Reason, Message: c.message(),
		LastHeartbeatTime: metav1.NewTime(now), LastTransitionTime: metav1.NewTime(since),
	}
}

// message tells of a cut that began before the hub did by what the Node says.
func (c change) message() string {
	if c.want.Type == Link && c.want.Message == answers && c.have != nil && c.have.Status == corev1.ConditionFalse {
		return again(report.Cut{From: c.have.LastTransitionTime.Time, To: c.want.Since, How: c.have.Reason})
	}
	return c.want.Message
}

// patch is the strategic merge patch of the Node's status. It names single
// conditions, so that everybody else's stay.
func patch(changes []change, gone []corev1.NodeConditionType, now time.Time) ([]byte, error) {
	items := make([]any, 0, len(changes)+len(gone))
	for _, c := range changes {
		items = append(items, c.node(now))
	}
	for _, typ := range gone {
		items = append(items, map[string]any{"$patch": "delete", "type": typ})
	}
	return json.Marshal(map[string]any{"status": map[string]any{"conditions": items}})
}

// said is what an event tells of a change. Empty: nothing worth one.
func (c change) said() (kind, reason string) {
	if !c.turned() {
		return "", ""
	}
	kind = corev1.EventTypeNormal
	if c.want.Status == report.False {
		kind = corev1.EventTypeWarning
	}
	word := strings.TrimSuffix(strings.TrimPrefix(c.want.Type, prefix), "Ready")
	if c.have == nil && c.want.Status != report.False {
		return "", "" // a node that is new and well
	}
	// Not each word is worth one: a journal fills and empties all the time.
	switch c.want.Reason {
	case "Waiting", "Empty", "NotCompared":
		if c.have == nil || c.have.Status != corev1.ConditionFalse {
			return "", ""
		}
	}
	if c.want.Reason == "LinkUp" {
		return kind, "YurtHubLinkRestored"
	}
	return kind, prefix + word + c.want.Reason
}
