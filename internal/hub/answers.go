package hub

import (
	"bytes"
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
	// maxRemembered bounds the answers of each bucket.
	maxRemembered = 4096
	// prefetchEvery is how old discovery may grow before it is fetched
	// again without anybody asking.
	prefetchEvery = 24 * time.Hour
)

// answer is one remembered answer of the cloud.
type answer struct {
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
	log   *slog.Logger
	queue chan remembered // to run, which writes behind the requests

	mu     sync.Mutex        // guards hashes
	hashes map[string]string // bucket/key -> hash, so that nothing is written twice
}

type remembered struct {
	bucket, key string
	answer      answer
}

func newAnswers(s *store.Store, log *slog.Logger) *answers {
	return &answers{store: s, log: log, queue: make(chan remembered, 256), hashes: map[string]string{}}
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
	a.evict(batch, objectBucket)
	if err := a.store.Commit(ctx, batch); err != nil && ctx.Err() == nil {
		a.log.Error("answers not stored", "err", err)
		a.mu.Lock()
		clear(a.hashes) // they are written when next seen
		a.mu.Unlock()
	}
}

// evict drops the oldest answers when there are too many.
func (a *answers) evict(batch *store.Batch, bucket string) {
	a.mu.Lock()
	many := len(a.hashes) >= maxRemembered
	a.mu.Unlock()
	if !many {
		return
	}
	type aged struct {
		key string
		at  uint64
	}
	var all []aged
	snap, err := a.store.Snapshot()
	if err != nil {
		return
	}
	defer snap.Close()
	_ = snap.Scan(bucket, "", func(key string, h store.Header) error {
		all = append(all, aged{key, h.Version})
		return nil
	})
	slices.SortFunc(all, func(x, y aged) int { return int(int64(x.at) - int64(y.at)) })
	for _, old := range all[:max(0, len(all)-maxRemembered/2)] {
		batch.Delete(bucket, old.key)
	}
	a.mu.Lock()
	clear(a.hashes)
	a.mu.Unlock()
}

// documentKey names a document: its path and query, apart from its form.
func documentKey(u *url.URL) string {
	if u.RawQuery == "" {
		return u.Path
	}
	return u.Path + "?" + u.RawQuery
}

// objectKey names an object for one identity only.
func objectKey(c *identity.Caller, info request.Info) string {
	who := sha256.Sum256([]byte(c.Name + "\x00" + c.UID + "\x00" + strings.Join(c.Groups, "\x00")))
	return hex.EncodeToString(who[:12]) + " " + info.Path
}

// keep returns a link.Keep that remembers the answer under the key.
func (a *answers) keep(bucket, key string) link.Keep {
	return func(resp *http.Response) func([]byte) {
		if resp.StatusCode != http.StatusOK {
			return nil
		}
		contentType, packed := resp.Header.Get("Content-Type"), resp.Header.Get("Content-Encoding")
		etag := resp.Header.Get("Etag")
		return func(body []byte) { a.remember(bucket, key, contentType, packed, etag, body) }
	}
}

func (a *answers) remember(bucket, key, contentType, packed, etag string, body []byte) {
	if packed == "gzip" {
		r, err := gzip.NewReader(bytes.NewReader(body))
		if err != nil {
			return
		}
		if body, err = io.ReadAll(io.LimitReader(r, maxAnswer+1)); err != nil || len(body) > maxAnswer {
			return
		}
	} else if packed != "" {
		return
	}
	if bucket == documentBucket {
		key += " " + contentType
	}
	sum := sha256.Sum256(body)
	hash := hex.EncodeToString(sum[:])
	a.mu.Lock()
	same := a.hashes[bucket+key] == hash
	a.mu.Unlock()
	if same {
		return
	}
	if old, err := a.load(bucket, key); err != nil || old.Hash != hash {
		select {
		case a.queue <- remembered{bucket, key, answer{ContentType: contentType, ETag: etag, At: time.Now(), Hash: hash, Body: body}}:
		default:
			return // the disk is slow; it is remembered the next time
		}
	}
	a.mu.Lock()
	a.hashes[bucket+key] = hash
	a.mu.Unlock()
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
	accept := strings.Join(h.Values("Accept"), ",")
	if accept == "" {
		accept = "*/*"
	}
	for _, clause := range strings.Split(accept, ",") {
		for _, have := range types {
			if accepts(clause, have) {
				return a.load(documentBucket, prefix+have)
			}
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
		if have, err := a.document(u, header); err == nil && time.Since(have.At) < prefetchEvery {
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
		body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
		_ = resp.Body.Close()
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
	enc := wire.JSON
	if strings.HasPrefix(a.ContentType, "application/vnd.kubernetes.protobuf") {
		enc = wire.Protobuf
	}
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
