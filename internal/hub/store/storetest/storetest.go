// Package storetest holds what every store must do, as tests.
package storetest

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/yurt-edge/yurt/internal/hub/store"
)

// Run tests the stores that open returns: an empty one when called with an
// unused path, else the one that was closed there.
func Run(t *testing.T, open func(t *testing.T, path string) *store.Store) {
	for _, c := range []struct {
		name string
		test func(*testing.T, *bed)
	}{
		{"GetReturnsWhatWasPut", getReturnsWhatWasPut},
		{"NamesAreArbitrary", namesAreArbitrary},
		{"ScanIsOrderedAndStartsAnywhere", scanIsOrdered},
		{"ScanStopsAtError", scanStopsAtError},
		{"SnapshotStandsStill", snapshotStandsStill},
		{"ReadersMayWriteAndNest", readersMayWriteAndNest},
		{"ChangesApplyInOrder", changesApplyInOrder},
		{"InvalidBatchIsRefusedAlone", invalidBatchIsRefusedAlone},
		{"SubmitKeepsOrder", submitKeepsOrder},
		{"CloseWritesTheQueue", closeWritesTheQueue},
		{"RandomHistoryMatchesModel", randomHistory},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := &bed{path: t.TempDir() + "/store", open: open}
			b.reopen(t)
			c.test(t, b)
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// bed is a store under test.
type bed struct {
	*store.Store
	path string
	open func(t *testing.T, path string) *store.Store
}

func (b *bed) reopen(t *testing.T) {
	t.Helper()
	if b.Store != nil {
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
	b.Store = b.open(t, b.path)
}

func (b *bed) commit(t *testing.T, fill func(*store.Batch)) {
	t.Helper()
	batch := store.NewBatch()
	fill(batch)
	if err := b.Commit(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
}

func (b *bed) snapshot(t *testing.T) *store.Snapshot {
	t.Helper()
	sn, err := b.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	return sn
}

// dump returns the whole store, through Scan and Get.
func (b *bed) dump(t *testing.T) map[string]map[string]store.Record {
	t.Helper()
	names, err := b.Buckets()
	if err != nil {
		t.Fatal(err)
	}
	sn := b.snapshot(t)
	defer sn.Close()
	all := make(map[string]map[string]store.Record)
	for _, name := range names {
		all[name] = make(map[string]store.Record)
		err := sn.Scan(name, "", func(key string, h store.Header) error {
			r, err := sn.Get(name, key)
			if err == nil && (r.Version != h.Version || r.Encoding != h.Encoding || len(r.Data) != h.Size) {
				t.Errorf("header of %q is %+v, record %d %d %d", key, h, r.Version, r.Encoding, len(r.Data))
			}
			all[name][key] = r
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return all
}

func want(t *testing.T, sn *store.Snapshot, bucket, key, data string) {
	t.Helper()
	r, err := sn.Get(bucket, key)
	if err != nil {
		t.Fatal(err)
	}
	if string(r.Data) != data {
		t.Fatalf("%q in %q is %.40q, want %.40q", key, bucket, r.Data, data)
	}
}

func wantNone(t *testing.T, sn *store.Snapshot, bucket, key string) {
	t.Helper()
	if _, err := sn.Get(bucket, key); !errors.Is(err, store.ErrNotFound) {
		t.Fatalf("%q in %q: %v, want not found", key, bucket, err)
	}
}

func getReturnsWhatWasPut(t *testing.T, b *bed) {
	random := make([]byte, 100_000)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(random)
	records := map[string]store.Record{
		"empty":  {Version: 1},
		"small":  {Version: 1<<64 - 1, Encoding: 255, Data: []byte("x")},
		"text":   {Version: 3, Encoding: 1, Data: bytes.Repeat([]byte("status: Running\n"), 1000)},
		"random": {Version: 4, Encoding: 2, Data: random},
		"large":  {Version: 5, Data: bytes.Repeat(random, 30)},
	}
	b.commit(t, func(batch *store.Batch) {
		for key, r := range records {
			batch.Put("b", key, r)
		}
	})
	for range 2 {
		sn := b.snapshot(t)
		for key, r := range records {
			prefix := []byte("prefix")
			got, h, err := sn.AppendData(prefix, "b", key)
			if err != nil {
				t.Fatal(err)
			}
			if h != (store.Header{Version: r.Version, Encoding: r.Encoding, Size: len(r.Data)}) {
				t.Errorf("header of %s: %+v", key, h)
			}
			if !bytes.Equal(got, append(prefix, r.Data...)) {
				t.Errorf("data of %s differs", key)
			}
		}
		wantNone(t, sn, "b", "other")
		wantNone(t, sn, "other", "small")
		sn.Close()
		b.reopen(t)
	}
}

func namesAreArbitrary(t *testing.T, b *bed) {
	names := []string{"\x00", "\xff\xfe", "m", "q", "d", "a/b", "a\x00b", " ", "é", strings.Repeat("n", 16<<10)}
	b.commit(t, func(batch *store.Batch) {
		for _, bucket := range names {
			for _, key := range names {
				batch.Put(bucket, key, store.Record{Data: []byte(bucket + "|" + key)})
			}
		}
	})
	sn := b.snapshot(t)
	defer sn.Close()
	for _, bucket := range names {
		for _, key := range names {
			want(t, sn, bucket, key, bucket+"|"+key)
		}
	}
	got, err := b.Buckets()
	if err != nil {
		t.Fatal(err)
	}
	if want := slices.Sorted(slices.Values(names)); !slices.Equal(got, want) {
		t.Errorf("buckets %.80q, want %.80q", got, want)
	}
}

func scanIsOrdered(t *testing.T, b *bed) {
	var keys []string
	for i := range 500 {
		keys = append(keys, fmt.Sprintf("ns-%d/pod-%d", i%7, i))
	}
	b.commit(t, func(batch *store.Batch) {
		for i, key := range keys {
			batch.Put("pods", key, store.Record{Version: uint64(i), Data: []byte(key)})
		}
	})
	slices.Sort(keys)
	sn := b.snapshot(t)
	defer sn.Close()
	for _, from := range []string{"", "ns-3", "ns-3/", "ns-6/pod-97", "ns-6/pod-97\x00", "z"} {
		var got []string
		err := sn.Scan("pods", from, func(key string, _ store.Header) error {
			got = append(got, key)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		at, _ := slices.BinarySearch(keys, from)
		if !slices.Equal(got, keys[at:]) {
			t.Errorf("scan from %q: %d keys, want %d", from, len(got), len(keys[at:]))
		}
	}
	err := sn.Scan("nothing", "", func(string, store.Header) error { return errors.New("called") })
	if err != nil {
		t.Error(err)
	}
}

func scanStopsAtError(t *testing.T, b *bed) {
	b.commit(t, func(batch *store.Batch) {
		batch.Put("b", "1", store.Record{})
		batch.Put("b", "2", store.Record{})
	})
	sn := b.snapshot(t)
	defer sn.Close()
	stop, calls := errors.New("stop"), 0
	err := sn.Scan("b", "", func(string, store.Header) error { calls++; return stop })
	if !errors.Is(err, stop) || calls != 1 {
		t.Errorf("%v after %d calls", err, calls)
	}
}

func snapshotStandsStill(t *testing.T, b *bed) {
	b.commit(t, func(batch *store.Batch) { batch.Put("b", "k", store.Record{Data: []byte("old")}) })
	sn := b.snapshot(t)
	for i := range 50 {
		b.commit(t, func(batch *store.Batch) {
			batch.Put("b", "k", store.Record{Data: []byte("new")})
			batch.Put("b", strconv.Itoa(i), store.Record{Data: bytes.Repeat([]byte{byte(i)}, 10_000)})
			batch.Put("c", "k", store.Record{})
		})
	}
	want(t, sn, "b", "k", "old")
	wantNone(t, sn, "b", "7")
	wantNone(t, sn, "c", "k")
	sn.Close()
	sn.Close()
	if _, err := sn.Get("b", "k"); !errors.Is(err, store.ErrClosed) {
		t.Errorf("closed snapshot: %v", err)
	}
	sn = b.snapshot(t)
	defer sn.Close()
	want(t, sn, "b", "k", "new")
}

func readersMayWriteAndNest(t *testing.T, b *bed) {
	sn := b.snapshot(t)
	defer sn.Close()
	// Far more than a small mapping would hold.
	noise := make([]byte, 1<<20)
	_, _ = rand.NewChaCha8([32]byte{2}).Read(noise)
	for i := range 20 {
		b.commit(t, func(batch *store.Batch) { batch.Put("b", strconv.Itoa(i), store.Record{Data: noise}) })
	}
	inner := b.snapshot(t)
	defer inner.Close()
	want(t, inner, "b", "19", string(noise))
	wantNone(t, sn, "b", "19")
}

func changesApplyInOrder(t *testing.T, b *bed) {
	put := func(batch *store.Batch, key, data string) {
		batch.Put("b", key, store.Record{Data: []byte(data)})
	}
	b.commit(t, func(batch *store.Batch) {
		put(batch, "k", "1")
		batch.Delete("b", "k")
		put(batch, "k", "2")
		put(batch, "gone", "1")
		batch.Delete("b", "gone")
		batch.Delete("b", "never")
		batch.Delete("none", "never")
		batch.Drop("none")
	})
	sn := b.snapshot(t)
	want(t, sn, "b", "k", "2")
	wantNone(t, sn, "b", "gone")
	sn.Close()

	b.commit(t, func(batch *store.Batch) {
		put(batch, "before", "1")
		batch.Drop("b")
		put(batch, "after", "1")
	})
	sn = b.snapshot(t)
	wantNone(t, sn, "b", "k")
	wantNone(t, sn, "b", "before")
	want(t, sn, "b", "after", "1")
	sn.Close()

	b.commit(t, func(batch *store.Batch) { batch.Drop("b") })
	if names, err := b.Buckets(); err != nil || len(names) != 0 {
		t.Errorf("buckets %q, %v", names, err)
	}
	b.reopen(t)
	if names, err := b.Buckets(); err != nil || len(names) != 0 || b.Rebuilt() {
		t.Errorf("buckets %q, %v, rebuilt %v", names, err, b.Rebuilt())
	}
}

func invalidBatchIsRefusedAlone(t *testing.T, b *bed) {
	for name, fill := range map[string]func(*store.Batch){
		"no bucket":   func(batch *store.Batch) { batch.Put("", "k", store.Record{}) },
		"no key":      func(batch *store.Batch) { batch.Delete("b", "") },
		"long key":    func(batch *store.Batch) { batch.Put("b", strings.Repeat("k", 20_000), store.Record{}) },
		"drop no one": func(batch *store.Batch) { batch.Drop("") },
	} {
		batch := store.NewBatch()
		batch.Put("b", "fine", store.Record{})
		fill(batch)
		if err := b.Commit(t.Context(), batch); !errors.Is(err, store.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
		err := b.Submit(t.Context(), batch, func(error) { t.Errorf("%s: done called", name) })
		if !errors.Is(err, store.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	sn := b.snapshot(t)
	defer sn.Close()
	wantNone(t, sn, "b", "fine")
}

func submitKeepsOrder(t *testing.T, b *bed) {
	var order []int // written by the committer only, read after a barrier
	for i := range 300 {
		batch := store.NewBatch()
		batch.Put("b", "k", store.Record{Version: uint64(i)})
		batch.Put("b", strconv.Itoa(i), store.Record{Data: make([]byte, i*10)})
		err := b.Submit(t.Context(), batch, func(err error) {
			if err != nil {
				t.Error(err)
			}
			order = append(order, i)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	b.commit(t, func(*store.Batch) {})
	if len(order) != 300 || !slices.IsSorted(order) {
		t.Errorf("done called %d times, in order: %v", len(order), slices.IsSorted(order))
	}
	sn := b.snapshot(t)
	defer sn.Close()
	if r, err := sn.Get("b", "k"); err != nil || r.Version != 299 {
		t.Errorf("version %d, %v", r.Version, err)
	}
}

func closeWritesTheQueue(t *testing.T, b *bed) {
	for i := range 20 {
		batch := store.NewBatch()
		batch.Put("b", strconv.Itoa(i), store.Record{})
		if err := b.Submit(t.Context(), batch, nil); err != nil {
			t.Fatal(err)
		}
	}
	closed := b.Store
	b.reopen(t)
	if n := len(b.dump(t)["b"]); n != 20 {
		t.Errorf("%d of 20 there", n)
	}
	batch := store.NewBatch()
	if err := closed.Commit(t.Context(), batch); !errors.Is(err, store.ErrClosed) {
		t.Errorf("commit to closed store: %v", err)
	}
	if _, err := closed.Snapshot(); !errors.Is(err, store.ErrClosed) {
		t.Errorf("snapshot of closed store: %v", err)
	}
	if err := closed.Close(); !errors.Is(err, store.ErrClosed) {
		t.Errorf("second close: %v", err)
	}
}

func randomHistory(t *testing.T, b *bed) {
	rng := rand.New(rand.NewPCG(1, 2))
	model := make(map[string]map[string]store.Record)
	noise := make([]byte, 20_000)
	_, _ = rand.NewChaCha8([32]byte{3}).Read(noise)
	for round := range 150 {
		b.commit(t, func(batch *store.Batch) {
			for range rng.IntN(40) {
				bucket, key := strconv.Itoa(rng.IntN(4)), strconv.Itoa(rng.IntN(200))
				switch n := rng.IntN(100); {
				case n == 0:
					batch.Drop(bucket)
					delete(model, bucket)
				case n < 30:
					batch.Delete(bucket, key)
					delete(model[bucket], key)
				default:
					r := store.Record{Version: rng.Uint64(), Encoding: uint8(round), Data: noise[:rng.IntN(1<<rng.IntN(15))]}
					batch.Put(bucket, key, r)
					if model[bucket] == nil {
						model[bucket] = make(map[string]store.Record)
					}
					model[bucket][key] = r
				}
			}
		})
		if round%15 == 14 {
			b.reopen(t)
			if b.Rebuilt() {
				t.Fatal("rebuilt")
			}
		}
	}
	got := b.dump(t)
	for _, bucket := range []string{"0", "1", "2", "3"} {
		if len(got[bucket]) != len(model[bucket]) {
			t.Errorf("bucket %s holds %d, want %d", bucket, len(got[bucket]), len(model[bucket]))
		}
		for key, r := range model[bucket] {
			g := got[bucket][key]
			if g.Version != r.Version || g.Encoding != r.Encoding || !bytes.Equal(g.Data, r.Data) {
				t.Errorf("%s in %s differs", key, bucket)
			}
		}
	}
}
