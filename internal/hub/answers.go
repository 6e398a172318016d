package hub

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/internal/hub/clock"
	"github.com/yurt-edge/yurt/internal/hub/identity"
	"github.com/yurt-edge/yurt/internal/hub/link"
	"github.com/yurt-edge/yurt/internal/hub/request"
	"github.com/yurt-edge/yurt/internal/hub/store"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

const (
	documentBucket = "answers/documents"
	objectBucket   = "answers/objects"

	// maxAnswer bounds one answer, unpacked.
	maxAnswer = 16 << 20
	// maxRemembered and maxRememberedBytes bound the answers of each
	// bucket; the oldest go first.
	maxRemembered      = 4096
	maxRememberedBytes = 64 << 20
	// maxQueued bounds the bytes of answers that wait to be written, those
	// that are being unpacked included.
	maxQueued = 32 << 20
	// rewriteEvery is how often one object's answer is written at most: a
	// pod that polls an object must not wear the flash.
	rewriteEvery = time.Minute
	// prefetchEvery is how old discovery may grow before it is fetched
	// again without anybody asking.
	prefetchEvery = 24 * time.Hour
)

// answer is one remembered answer of the cloud.
type answer struct {
	Accept      string    `json:"accept,omitempty"` // of the request
	ContentType string    `json:"contentType"`
	ETag        string    `json:"etag,omitempty"`
	At          time.Time `json:"at"`
	Hash        string    `json:"hash"`
	Body        []byte    `json:"body"`
}

// answers remembers what the cloud last said to a get: discovery and the like
// for everybody, single objects for the identity that got them.
type answers struct {
	store *store.Store
	clock *clock.Clock
	log   *slog.Logger
	queue chan remembered     // to run, which writes behind the requests
	room  *semaphore.Weighted // bytes of maxQueued that are free

	mu   sync.Mutex // guards seen
	seen map[string]noted
}

// noted is the last answer under a bucket and key, so that nothing is written
// twice.
type noted struct {
	hash string
	at   time.Time // when it was last handed over to be written
}

type remembered struct {
	bucket, key string
	answer      answer
	gone        bool  // the object is no more
	size        int64 // taken from room
}

func newAnswers(s *store.Store, by *clock.Clock, log *slog.Logger) *answers {
	return &answers{store: s, clock: by, log: log, queue: make(chan remembered, 256), room: semaphore.NewWeighted(maxQueued), seen: map[string]noted{}}
}

// run writes what was remembered until ctx ends.
func (a *answers) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case first := <-a.queue:
			a.write(ctx, first)
		}
	}
}

func (a *answers) write(ctx context.Context, first remembered) {
	batch := store.NewBatch()
	add := func(r remembered) {
		defer a.room.Release(r.size)
		if r.gone {
			batch.Delete(r.bucket, r.key)
			return
		}
		text, err := json.Marshal(r.answer)
		if err == nil {
			batch.Put(r.bucket, r.key, store.Record{Version: uint64(r.answer.At.Unix()), Data: text})
		}
	}
	add(first)
	for more := true; more && batch.Len() < cap(a.queue); {
		select {
		case r := <-a.queue:
			add(r)
		default:
			more = false
		}
	}
	a.evict(batch, documentBucket)
	a.evict(batch, objectBucket)
	if err := a.store.Commit(ctx, batch); err != nil && ctx.Err() == nil {
		a.log.Error("answers not stored", "err", err)
		a.mu.Lock()
		clear(a.seen) // they are written when next seen
		a.mu.Unlock()
	}
}

// evict drops answers when there are too many: the oldest of whoever has most
// of them, so that a caller who gets much pushes out its own.
func (a *answers) evict(batch *store.Batch, bucket string) {
	type aged struct {
		key  string
		at   uint64
		size int
	}
	type share struct {
		all  []aged
		size int
	}
	shares := map[string]*share{}
	count, total := 0, 0
	snap, err := a.store.Snapshot()
	if err != nil {
		return
	}
	defer snap.Close()
	// What a damaged bucket still shows can be dropped like the rest.
	_ = snap.Scan(bucket, "", func(key string, h store.Header) error {
		who := "" // documents are everybody's
		if bucket == objectBucket {
			who, _, _ = strings.Cut(key, " ")
		}
		s := shares[who]
		if s == nil {
			s = &share{}
			shares[who] = s
		}
		size := h.Size + answerCost
		s.all, s.size = append(s.all, aged{key, h.Version, size}), s.size+size
		count, total = count+1, total+size
		return nil
	})
	if count <= maxRemembered && total <= maxRememberedBytes {
		return
	}
	for _, s := range shares {
		slices.SortFunc(s.all, func(x, y aged) int { return cmp.Compare(x.at, y.at) })
	}
	for count > maxRemembered*3/4 || total > maxRememberedBytes*3/4 {
		var most *share
		for _, s := range shares {
			if most == nil || s.size > most.size {
				most = s
			}
		}
		oldest := most.all[0]
		batch.Delete(bucket, oldest.key)
		most.all, most.size = most.all[1:], most.size-oldest.size
		count, total = count-1, total-oldest.size
	}
	a.mu.Lock()
	clear(a.seen)
	a.mu.Unlock()
}

// answerCost is what an answer is taken to cost beside its bytes: many small
// ones are much, too.
const answerCost = maxRememberedBytes / maxRemembered

// documentKey names a document, apart from its form. Of the query only the
// hash matters, by which OpenAPI clients ask: the API server ignores others,
// such as kubectl's timeout.
func documentKey(u *url.URL) string {
	if hash := u.Query().Get("hash"); hash != "" {
		return u.Path + "?hash=" + url.QueryEscape(hash)
	}
	return u.Path
}

// objectKey names an object for one identity only.
func objectKey(c *identity.Caller, info request.Info) string {
	who := sha256.Sum256([]byte(c.Name + "\x00" + c.UID + "\x00" + strings.Join(c.Groups, "\x00")))
	return hex.EncodeToString(who[:12]) + " " + info.Path
}

// keep returns a link.Keep that remembers the answer under the key.
func (a *answers) keep(bucket, key string) link.Keep {
	return func(resp *http.Response) func([]byte) {
		if (resp.StatusCode == http.StatusNotFound || resp.StatusCode == http.StatusForbidden) && bucket == objectBucket {
			a.forget(bucket, key)
		}
		if resp.StatusCode != http.StatusOK {
			return nil
		}
		packed := resp.Header.Get("Content-Encoding")
		known := answer{ContentType: resp.Header.Get("Content-Type"), ETag: resp.Header.Get("Etag")}
		if resp.Request != nil {
			known.Accept = acceptOf(resp.Request.Header)
		}
		return func(body []byte) { a.remember(bucket, key, packed, known, body) }
	}
}

// acceptOf returns what a request accepts, as one line.
func acceptOf(h http.Header) string {
	if accept := strings.Join(h.Values("Accept"), ","); accept != "" {
		return accept
	}
	return "*/*"
}

func (a *answers) remember(bucket, key, packed string, known answer, body []byte) {
	size := int64(len(body))
	if packed != "" {
		size = maxAnswer // nobody knows before it is unpacked
	}
	if !a.room.TryAcquire(size) {
		return // the disk is slow; it is remembered the next time
	}
	defer func() { a.room.Release(size) }()
	if packed == "gzip" {
		r, err := gzip.NewReader(bytes.NewReader(body))
		if err != nil {
			return
		}
		if body, err = io.ReadAll(io.LimitReader(r, maxAnswer+1)); err != nil || len(body) > maxAnswer {
			return
		}
		a.room.Release(size - int64(len(body)))
		size = int64(len(body))
	} else if packed != "" {
		return
	}
	if bucket == documentBucket {
		key += " " + known.ContentType
	} else if !isObject(known.ContentType, body) {
		return
	}
	sum := sha256.Sum256(body)
	hash := hex.EncodeToString(sum[:])
	a.mu.Lock()
	last := a.seen[bucket+key]
	a.mu.Unlock()
	if last.hash == hash || (bucket == objectBucket && time.Since(last.at) < rewriteEvery) {
		return
	}
	if old, err := a.load(bucket, key); err != nil || old.Hash != hash {
		known.At, known.Hash, known.Body = a.clock.Now(), hash, body
		select {
		case a.queue <- remembered{bucket: bucket, key: key, answer: known, size: size}:
			size = 0 // write gives it back
		default:
			return // as above
		}
	}
	a.mu.Lock()
	if len(a.seen) >= 2*maxRemembered {
		clear(a.seen)
	}
	a.seen[bucket+key] = noted{hash, time.Now()}
	a.mu.Unlock()
}

// isObject tells a whole object from a table or partial metadata of it, which
// other clients could not use.
func isObject(contentType string, body []byte) bool {
	apiVersion, _, _, err := wire.ReadObject(encodingOf(contentType), body)
	return err == nil && !strings.HasPrefix(apiVersion, metav1.GroupName+"/")
}

func encodingOf(contentType string) wire.Encoding {
	if strings.HasPrefix(contentType, "application/vnd.kubernetes.protobuf") {
		return wire.Protobuf
	}
	return wire.JSON
}

// forget drops what is remembered of an object that is no more.
func (a *answers) forget(bucket, key string) {
	if _, err := a.load(bucket, key); errors.Is(err, store.ErrNotFound) {
		return
	}
	select {
	case a.queue <- remembered{bucket: bucket, key: key, gone: true}:
		a.mu.Lock()
		delete(a.seen, bucket+key)
		a.mu.Unlock()
	default: // the next answer says so again
	}
}

func (a *answers) load(bucket, key string) (answer, error) {
	snap, err := a.store.Snapshot()
	if err != nil {
		return answer{}, err
	}
	defer snap.Close()
	record, err := snap.Get(bucket, key)
	if err != nil {
		return answer{}, err
	}
	var out answer
	if err := json.Unmarshal(record.Data, &out); err != nil {
		return answer{}, fmt.Errorf("read remembered answer %s: %w", key, err)
	}
	return out, nil
}

// document returns the remembered form of a document that the client wants
// most.
func (a *answers) document(u *url.URL, h http.Header) (answer, error) {
	prefix := documentKey(u) + " "
	var types []string
	snap, err := a.store.Snapshot()
	if err != nil {
		return answer{}, err
	}
	err = snap.Scan(documentBucket, prefix, func(key string, _ store.Header) error {
		if !strings.HasPrefix(key, prefix) {
			return errStop
		}
		types = append(types, key[len(prefix):])
		return nil
	})
	snap.Close()
	if err != nil && !errors.Is(err, errStop) {
		return answer{}, err
	}
	accept := acceptOf(h)
	for clause := range strings.SplitSeq(accept, ",") {
		for _, have := range types {
			if accepts(clause, have) {
				return a.load(documentBucket, prefix+have)
			}
		}
	}
	// OpenAPI comes under types that nobody asks for by that name: what
	// answered the same header before will do.
	for _, have := range types {
		if held, err := a.load(documentBucket, prefix+have); err == nil && held.Accept == accept {
			return held, nil
		}
	}
	return answer{}, store.ErrNotFound
}

var errStop = errors.New("stop")

// accepts reports whether a clause of an Accept header takes the type.
func accepts(clause, contentType string) bool {
	want, params, err := mime.ParseMediaType(strings.TrimSpace(clause))
	if err != nil {
		return false
	}
	have, haveParams, err := mime.ParseMediaType(contentType)
	if err != nil {
		return false
	}
	for _, name := range []string{"g", "v", "as"} {
		if params[name] != haveParams[name] {
			return false
		}
	}
	major, _, _ := strings.Cut(have, "/")
	return want == have || want == "*/*" || want == major+"/*"
}

// write sends a remembered answer.
func (a answer) write(w http.ResponseWriter) {
	h := w.Header()
	h.Set("Content-Type", a.ContentType)
	h.Set("Cache-Control", "no-cache, private")
	if a.ETag != "" {
		h.Set("Etag", a.ETag)
	}
	w.WriteHeader(http.StatusOK)
	_, _ = w.Write(a.Body) // a client that went away needs no answer
}

// discovery is what clients ask before they ask for anything, in the forms
// in which client-go and kubectl ask.
var discovery = []struct{ path, accept string }{
	{"/version", "application/json"},
	{"/api", "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"},
	{"/apis", "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"},
	{"/api", "application/json"},
	{"/apis", "application/json"},
	{"/api/v1", "application/json"},
}

// prefetch fetches discovery for the case that nobody asks before the link
// goes down. It does nothing while what is held is young.
func (a *answers) prefetch(ctx context.Context, cloud http.RoundTripper) error {
	for _, d := range discovery {
		u := &url.URL{Scheme: "https", Host: "upstream", Path: d.path}
		header := http.Header{"Accept": {d.accept}, "Accept-Encoding": {"gzip"}, "User-Agent": {"yurthub"}}
		if have, err := a.document(u, header); err == nil && !a.clock.Aged(have.At, prefetchEvery) {
			continue
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
		if err != nil {
			return fmt.Errorf("prefetch %s: %w", d.path, err)
		}
		req.Header = header
		resp, err := cloud.RoundTrip(req)
		if err != nil {
			return fmt.Errorf("prefetch %s: %w", d.path, err)
		}
		body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
		_ = resp.Body.Close()
		if err == nil && len(body) > maxAnswer {
			err = errors.New("the answer is too large")
		}
		if err != nil {
			return fmt.Errorf("prefetch %s: %w", d.path, err)
		}
		if done := a.keep(documentBucket, documentKey(u))(resp); done != nil {
			done(body)
		}
	}
	return nil
}

// object returns the remembered answer to a get of this identity.
func (a *answers) object(c *identity.Caller, info request.Info) (answer, error) {
	return a.load(objectBucket, objectKey(c, info))
}

// writeObject sends a remembered object in a form that the client accepts.
func (a answer) writeObject(w http.ResponseWriter, formats []request.Format) error {
	enc := encodingOf(a.ContentType)
	apiVersion, kind, object, err := wire.ReadObject(enc, a.Body)
	if err != nil {
		return fmt.Errorf("read remembered object: %w", err)
	}
	for _, f := range formats {
		if f.View != request.Whole {
			continue
		}
		if f.Encoding == enc {
			a.write(w)
			return nil
		}
		var out []byte
		if f.Encoding == wire.JSON {
			out, err = wire.ToJSON(nil, apiVersion, kind, object, true)
			a.ContentType = "application/json"
		} else {
			out, err = wire.FromJSON(apiVersion, kind, object)
			a.ContentType = "application/vnd.kubernetes.protobuf"
		}
		if err != nil {
			return fmt.Errorf("convert remembered %s: %w", kind, err)
		}
		a.Body = wire.AppendObject(nil, f.Encoding, apiVersion, kind, out)
		a.write(w)
		return nil
	}
	return errors.New("the remembered object is in no form that the client accepts")
}
