package nameserver

import (
	"math"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/miekg/dns"
)

const (
	// cacheBytes bounds what is kept of other servers' answers.
	cacheBytes = 2 << 20
	// cacheAnswer is how large an answer is kept at most.
	cacheAnswer = 16 << 10
	// entryBytes is what an entry costs beside its own bytes.
	entryBytes = 200

	maxTTL      = time.Hour
	maxNegative = 5 * time.Minute
	// failureTTL is how long a failure counts (RFC 9520).
	failureTTL = 2 * time.Second
	// unsaidTTL is how long a negative answer holds that does not say.
	unsaidTTL = 5 * time.Second
	// staleFor is how long an answer is given after its time when there is
	// no newer one, and staleTTL what clients are told of it (RFC 8767).
	staleFor = 3 * 24 * time.Hour
	staleTTL = 30
)

// question is what an answer of another server is kept by.
type question struct {
	name  string // lower case
	qtype uint16
	do    bool // DNSSEC records are wanted
	cd    bool // and are checked by whoever asks
}

// entry is an answer as it came.
type entry struct {
	packed []byte // nil: there was none
	stored time.Time
	ttl    time.Duration
}

func (e *entry) fresh(now time.Time) bool { return now.Sub(e.stored) < e.ttl }

// message returns the answer with the time that is left of it.
func (e *entry) message(now time.Time) (*dns.Msg, error) {
	m := new(dns.Msg)
	if err := m.Unpack(e.packed); err != nil {
		return nil, err
	}
	age := uint32(now.Sub(e.stored) / time.Second) //nolint:gosec // bounded by staleFor
	fresh := e.fresh(now)
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			switch h := rr.Header(); {
			case h.Rrtype == dns.TypeOPT:
			case !fresh:
				h.Ttl = staleTTL
			default:
				h.Ttl -= min(age, h.Ttl)
				h.Ttl = min(h.Ttl, uint32(e.ttl/time.Second)) //nolint:gosec // at most an hour
			}
		}
	}
	return m, nil
}

// cache keeps answers within a number of bytes; what was not asked for longest
// goes first.
type cache struct {
	mu    sync.Mutex // guards the following
	lru   *simplelru.LRU[question, *entry]
	bytes int
	most  int
	// failed are questions whose last attempt failed. What was known before
	// is kept.
	failed map[question]time.Time
}

// maxFailed bounds the failures that are remembered.
const maxFailed = 4096

func newCache(most int) *cache {
	c := &cache{most: most, failed: map[question]time.Time{}}
	lru, err := simplelru.NewLRU(math.MaxInt32, func(q question, e *entry) { c.bytes -= cost(q, e) })
	if err != nil {
		panic("nameserver: " + err.Error()) // its size is a constant
	}
	c.lru = lru
	return c
}

func cost(q question, e *entry) int { return entryBytes + len(q.name) + len(e.packed) }

// get returns what is kept, however old; nil: nothing. The last attempt to get
// a newer one failed just now if failed.
func (c *cache) get(q question, now time.Time) (e *entry, failed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if at, ok := c.failed[q]; ok {
		if failed = now.Sub(at) < failureTTL; !failed {
			delete(c.failed, q)
		}
	}
	e, ok := c.lru.Get(q)
	if ok && now.Sub(e.stored) > e.ttl+staleFor {
		c.lru.Remove(q)
		return nil, failed
	}
	return e, failed
}

// put keeps an answer.
func (c *cache) put(q question, m *dns.Msg, now time.Time) {
	packed, err := m.Pack()
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.failed, q)
	if err != nil || len(packed) > cacheAnswer {
		return
	}
	e := &entry{packed: packed, stored: now, ttl: ttlOf(m)}
	if old, ok := c.lru.Peek(q); ok {
		c.bytes -= cost(q, old) // the eviction is told of others only
	}
	c.lru.Add(q, e)
	for c.bytes += cost(q, e); c.bytes > c.most; {
		c.lru.RemoveOldest()
	}
}

// fail takes note that nobody could answer.
func (c *cache) fail(q question, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.failed) >= maxFailed {
		clear(c.failed)
	}
	c.failed[q] = now
}

func (c *cache) size() (entries, bytes int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lru.Len(), c.bytes
}

// ttlOf is how long an answer holds: a negative one as its SOA says (RFC 2308).
func ttlOf(m *dns.Msg) time.Duration {
	least, most := uint32(math.MaxUint32), maxTTL
	for _, rr := range m.Answer {
		least = min(least, rr.Header().Ttl)
	}
	if m.Rcode == dns.RcodeNameError || !answers(m) {
		most = maxNegative
		negative := uint32(unsaidTTL / time.Second)
		for _, rr := range m.Ns {
			if soa, ok := rr.(*dns.SOA); ok {
				negative = min(soa.Minttl, soa.Hdr.Ttl)
			}
		}
		least = min(least, negative)
	}
	return min(time.Duration(least)*time.Second, most)
}

// answers tells an answer that has what was asked for from one that says that
// there is none, maybe at the end of aliases.
func answers(m *dns.Msg) bool {
	for _, rr := range m.Answer {
		if t := rr.Header().Rrtype; len(m.Question) == 1 && (t == m.Question[0].Qtype || m.Question[0].Qtype == dns.TypeANY) {
			return true
		}
	}
	return false
}
