package store_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/yurt-edge/yurt/internal/hub/store"
)

const pageSize = 4096

// content is what a store should hold: bucket, key, data.
type content map[string]map[string][]byte

func (c content) clone() content {
	n := maps.Clone(c)
	for bucket := range n {
		n[bucket] = maps.Clone(n[bucket])
	}
	return n
}

// history makes a store by commits of puts and deletes of values of all
// sizes and returns its file and its content after each.
func history(t *testing.T, commits int) (images [][]byte, contents []content) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "store")
	rng := rand.New(rand.NewPCG(7, 7))
	source := noise(1 << 16)
	s := openTemp(t, store.Config{Path: path})
	c := make(content)
	commit := func() {
		b := store.NewBatch()
		for range 40 {
			bucket, key := fmt.Sprint("bucket-", rng.IntN(3)), fmt.Sprintf("ns/key-%03d", rng.IntN(120))
			if rng.IntN(5) == 0 {
				b.Delete(bucket, key)
				delete(c[bucket], key)
				continue
			}
			at := rng.IntN(1 << 15)
			data := source[at : at+rng.IntN(1<<rng.IntN(14))]
			b.Put(bucket, key, store.Record{Version: uint64(len(data)), Data: data})
			if c[bucket] == nil {
				c[bucket] = make(map[string][]byte)
			}
			c[bucket][key] = data
		}
		b.Put("tiny", "k", store.Record{Version: 1, Data: []byte("x")})
		c["tiny"] = map[string][]byte{"k": []byte("x")}
		if err := s.Commit(t.Context(), b); err != nil {
			t.Fatal(err)
		}
	}
	for range commits {
		commit()
		image, err := os.ReadFile(path) // nothing is written between commits
		if err != nil {
			t.Fatal(err)
		}
		images, contents = append(images, image), append(contents, c.clone())
	}
	return images, contents
}

// settled returns a store's file whose last two commits hold the same, so
// that falling back to the one before loses nothing.
func settled(t *testing.T) ([]byte, content) {
	t.Helper()
	images, contents := history(t, 12)
	path := filepath.Join(t.TempDir(), "store")
	write(t, path, images[11])
	s := openTemp(t, store.Config{Path: path})
	for range 2 {
		b := store.NewBatch()
		b.Put("tiny", "k", store.Record{Version: 1, Data: []byte("x")})
		if err := s.Commit(t.Context(), b); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	image, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return image, contents[11]
}

func write(t *testing.T, path string, image []byte) {
	t.Helper()
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
}

// outcome is how a store came out of damage.
type outcome struct {
	rebuilt                bool
	right, damaged, missed int
	older                  int
}

// inspect opens the file and compares it with what it should hold.
// Anything else but right data or ErrDamaged is an error.
func inspect(t *testing.T, path string, want content) outcome {
	t.Helper()
	s := openTemp(t, store.Config{Path: path})
	defer s.Close()
	if s.Rebuilt() {
		names, err := s.Buckets()
		if err != nil || len(names) > 0 {
			t.Errorf("rebuilt store holds %q, %v", names, err)
		}
		return outcome{rebuilt: true}
	}
	var o outcome
	sn, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	for bucket := range want {
		seen := make(map[string]bool)
		scanErr := sn.Scan(bucket, "", func(key string, h store.Header) error {
			seen[key] = true
			data, ok := want[bucket][key]
			if !ok || h.Size != len(data) || h.Version != uint64(len(data)) && bucket != "tiny" {
				t.Errorf("scan shows %s in %s as %+v, want %d bytes, %v", key, bucket, h, len(data), ok)
			}
			return nil
		})
		if scanErr != nil && !errors.Is(scanErr, store.ErrDamaged) {
			t.Errorf("scan: %v", scanErr)
		}
		for key, data := range want[bucket] {
			r, err := sn.Get(bucket, key)
			switch {
			case err == nil && bytes.Equal(r.Data, data):
				o.right++
			case errors.Is(err, store.ErrDamaged):
				o.damaged++
			default:
				t.Errorf("%s in %s: %v, %d bytes, want %d", key, bucket, err, len(r.Data), len(data))
			}
			if !seen[key] {
				o.missed++
				if scanErr == nil {
					t.Errorf("scan of %s missed %s and said nothing", bucket, key)
				}
			}
		}
	}
	sn.Close()
	// Whatever is left can be replaced.
	b := store.NewBatch()
	for bucket := range want {
		b.Drop(bucket)
		b.Put(bucket, "new", store.Record{Data: []byte("new")})
	}
	if err := s.Commit(t.Context(), b); err != nil {
		t.Errorf("replace buckets: %v", err)
	}
	if err := s.Health(); err != nil {
		t.Errorf("health: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openTemp(t, store.Config{Path: path})
	defer s.Close()
	if s.Rebuilt() {
		t.Error("rebuilt after buckets were replaced")
		return o
	}
	sn, err = s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	defer sn.Close()
	for bucket := range want {
		if err := sn.Scan(bucket, "", func(string, store.Header) error { return nil }); err != nil {
			t.Errorf("scan of replaced bucket: %v", err)
		}
		if _, err := sn.Get(bucket, "none"); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("replaced bucket: %v", err)
		}
	}
	return o
}

func scanIsDamaged(sn *store.Snapshot, bucket string) bool {
	return sn.Scan(bucket, "", func(string, store.Header) error { return nil }) != nil
}

// usedPages returns how many pages of the image hold something.
func usedPages(image []byte) int {
	used := 0
	for i := 0; i*pageSize < len(image); i++ {
		if binary.NativeEndian.Uint64(image[i*pageSize:]) == uint64(i) {
			used = i + 1
		}
	}
	return used
}

func TestFlippedBytesNeverGiveWrongData(t *testing.T) {
	t.Parallel()
	image, want := settled(t)
	path := filepath.Join(t.TempDir(), "store")
	rng := rand.New(rand.NewPCG(1, 1))
	pages := usedPages(image)
	var rebuilt, damaged, clean int
	for round := range 400 {
		bad := bytes.Clone(image)
		page := rng.IntN(pages) * pageSize
		switch round % 4 {
		case 0: // a bit, in the part that says what the page is
			bad[page+rng.IntN(100)] ^= 1 << rng.IntN(8)
		case 1: // a bit anywhere
			bad[page+rng.IntN(pageSize)] ^= 1 << rng.IntN(8)
		case 2: // some bytes
			for range 8 {
				bad[page+rng.IntN(pageSize)] = byte(rng.Uint32())
			}
		case 3: // a sector, as a torn write leaves it
			clear(bad[page+512*rng.IntN(8):][:512])
		}
		write(t, path, bad)
		switch o := inspect(t, path, want); {
		case o.rebuilt:
			rebuilt++
		case o.damaged > 0:
			damaged++
		default:
			clean++
		}
		if t.Failed() {
			t.Fatalf("round %d, page %d", round, page/pageSize)
		}
	}
	t.Logf("%d pages: rebuilt %d, objects damaged %d, unharmed %d", pages, rebuilt, damaged, clean)
	if rebuilt == 0 || damaged == 0 || clean == 0 {
		t.Error("not all cases were met")
	}
}

func TestTruncatedFile(t *testing.T) {
	t.Parallel()
	image, want := settled(t)
	path := filepath.Join(t.TempDir(), "store")
	rng := rand.New(rand.NewPCG(2, 2))
	sizes := []int{0, 1, 79, 80, pageSize, 2 * pageSize, 3*pageSize - 1}
	for range 30 {
		sizes = append(sizes, rng.IntN(usedPages(image)*pageSize))
	}
	for _, size := range sizes {
		write(t, path, image[:size])
		o := inspect(t, path, content{})
		if size > 0 && !o.rebuilt {
			t.Errorf("cut to %d bytes: opened", size)
		}
	}
	// The part that was never used may go.
	write(t, path, image[:usedPages(image)*pageSize])
	if o := inspect(t, path, want); o.rebuilt || o.damaged > 0 {
		t.Errorf("without its unused end: %+v", o)
	}
}

// A disk may lose a write that it has confirmed. The page then holds what it
// held before, which looks sound.
func TestLostWritesAreNoticed(t *testing.T) {
	t.Parallel()
	images, contents := history(t, 16)
	path := filepath.Join(t.TempDir(), "store")
	var rebuilt, noticed int
	for i := 10; i < len(images); i++ {
		for page := 2; page < usedPages(images[i-1]); page++ {
			bad := bytes.Clone(images[i])
			here := bad[page*pageSize:][:pageSize]
			was := images[i-1][page*pageSize:][:pageSize]
			if bytes.Equal(here, was) {
				continue
			}
			copy(here, was)
			write(t, path, bad)
			if o := inspectStale(t, path, contents[i], contents[:i]); o.rebuilt {
				rebuilt++
			} else if o.older+o.damaged+o.missed > 0 {
				noticed++
			}
			if t.Failed() {
				t.Fatalf("state %d, page %d", i, page)
			}
		}
	}
	t.Logf("rebuilt %d, noticed %d", rebuilt, noticed)
	if rebuilt+noticed == 0 {
		t.Error("nothing was lost")
	}
}

// inspectStale is inspect where older values may show in a bucket that Scan
// calls damaged.
func inspectStale(t *testing.T, path string, want content, older []content) outcome {
	t.Helper()
	s := openTemp(t, store.Config{Path: path})
	defer s.Close()
	if s.Rebuilt() {
		return outcome{rebuilt: true}
	}
	sn, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	defer sn.Close()
	var o outcome
	for bucket := range want {
		damaged := scanIsDamaged(sn, bucket)
		for key, data := range want[bucket] {
			r, err := sn.Get(bucket, key)
			wasSo := slices.ContainsFunc(older, func(c content) bool { return bytes.Equal(c[bucket][key], r.Data) })
			switch {
			case err == nil && bytes.Equal(r.Data, data):
				o.right++
			case err == nil && damaged && wasSo:
				o.older++
			case errors.Is(err, store.ErrDamaged):
				o.damaged++
			default:
				t.Errorf("%s in %s: %v, scan damaged: %v", key, bucket, err, damaged)
			}
		}
		if damaged {
			o.missed++
		}
	}
	return o
}

// A power cut in a commit leaves any part of the pages that were being
// written, but not the meta page that refers to them: that is written after
// a sync. The state before must be there, whole and unsuspected.
func TestPowerCutInCommitKeepsStateBefore(t *testing.T) {
	t.Parallel()
	images, contents := history(t, 16)
	path := filepath.Join(t.TempDir(), "store")
	rng := rand.New(rand.NewPCG(3, 3))
	for i := 1; i < len(images); i++ {
		for round := range 6 {
			cut := make([]byte, len(images[i])) // the file may have grown
			copy(cut, images[i-1])
			for at := 2 * pageSize; at < len(cut); at += 512 {
				if round == 0 || rng.IntN(2) == 0 {
					copy(cut[at:at+512], images[i][at:])
				}
			}
			if round%3 == 0 { // all data is there, the meta page is torn
				copy(cut[2*pageSize:], images[i][2*pageSize:])
				for _, meta := range []int{0, pageSize} {
					if !bytes.Equal(images[i][meta:meta+80], images[i-1][meta:meta+80]) {
						copy(cut[meta:meta+16+rng.IntN(64)], images[i][meta:])
					}
				}
			}
			write(t, path, cut)
			o := inspect(t, path, contents[i-1])
			if o.rebuilt || o.damaged+o.missed > 0 || t.Failed() {
				t.Fatalf("state %d, round %d: %+v", i, round, o)
			}
		}
	}
}

func TestDamagedValueIsSetAsideOnce(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "store")
	data := bytes.Repeat([]byte("0123456789abcdef"), 20)
	s := openTemp(t, store.Config{Path: path})
	b := store.NewBatch()
	for i := range 20 {
		b.Put("b", fmt.Sprintf("key-%02d", i), store.Record{Version: 5, Data: data})
	}
	if err := s.Commit(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	image, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// Keys are followed by their values in the page.
	key := []byte("key-07")
	at := bytes.LastIndex(image, key)
	image[at+len(key)+100] ^= 1 // in the payload
	write(t, path, image)

	var told []string
	s = openTemp(t, store.Config{Path: path, OnDamage: func(bucket, key string) { told = append(told, bucket+" "+key) }})
	sn, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	if err := sn.Scan("b", "", func(string, store.Header) error { return nil }); err != nil {
		t.Errorf("scan: %v", err)
	}
	for range 3 {
		if _, err := sn.Get("b", "key-07"); !errors.Is(err, store.ErrDamaged) {
			t.Errorf("damaged value: %v", err)
		}
		flush(t, s)
	}
	sn.Close()
	sn, err = s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	defer sn.Close()
	if _, err := sn.Get("b", "key-07"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("value set aside: %v", err)
	}
	if r, err := sn.Get("b", "key-08"); err != nil || !bytes.Equal(r.Data, data) {
		t.Errorf("its neighbour: %v", err)
	}
	sn.Close()
	if !slices.Equal(told, []string{"b key-07"}) || s.Stats().Damaged != 1 {
		t.Errorf("told of %q, counted %d", told, s.Stats().Damaged)
	}
	// The bucket is whole without it, and takes it back.
	b = store.NewBatch()
	b.Put("b", "key-07", store.Record{Version: 6, Data: data})
	if err := s.Commit(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openTemp(t, store.Config{Path: path})
	sn, err = s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	defer sn.Close()
	if _, err := sn.Get("b", "none"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("missing key of a whole bucket: %v", err)
	}
	if r, err := sn.Get("b", "key-07"); err != nil || r.Version != 6 {
		t.Errorf("value put again: %v", err)
	}
}

// flush waits until the committer has been through its work.
func flush(t *testing.T, s *store.Store) {
	t.Helper()
	for range 2 { // the second time it has seen what was reported before
		if err := s.Commit(t.Context(), store.NewBatch()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestWrongKeyAndGarbageBeginAnew(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "store")
	s := openTemp(t, store.Config{Path: path})
	fill(t, s, "b", 10, func(int) []byte { return []byte("secret") })
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	first, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(first, []byte("secret")) {
		t.Error("data in the clear")
	}
	other, err := store.Open(t.Context(), store.Config{Path: path, Key: bytes.Repeat([]byte{8}, 32)})
	if err != nil {
		t.Fatal(err)
	}
	if !other.Rebuilt() {
		t.Error("opened under another key")
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	if aside, err := os.ReadFile(path + ".damaged"); err != nil || !bytes.Equal(aside, first) {
		t.Errorf("file set aside: %v", err)
	}
	garbage := bytes.Repeat([]byte("garbage "), 5000)
	write(t, path, garbage)
	if o := inspect(t, path, nil); !o.rebuilt {
		t.Error("garbage opened")
	}
	if aside, err := os.ReadFile(path + ".damaged"); err != nil || !bytes.Equal(aside, garbage) {
		t.Errorf("newest file set aside: %v", err)
	}
	if _, err := store.Open(t.Context(), store.Config{Path: path, Key: []byte("short")}); err == nil {
		t.Error("short key accepted")
	}
}

func TestSecondOpenIsLockedOut(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "store")
	s := openTemp(t, store.Config{Path: path})
	fill(t, s, "b", 1, func(int) []byte { return nil })
	synctest.Test(t, func(t *testing.T) { // Open waits a second, here for free
		if _, err := store.Open(t.Context(), store.Config{Path: path, Key: testKey()}); !errors.Is(err, store.ErrLocked) {
			t.Errorf("second open: %v", err)
		}
	})
	flush(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s = openTemp(t, store.Config{Path: path}); s.Rebuilt() {
		t.Error("rebuilt")
	}
}

// A page that cannot be read raises SIGBUS, here because the file was cut
// under the mapping. A bad disk does the same.
func TestUnreadablePagesAreErrors(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "store")
	s := openTemp(t, store.Config{Path: path})
	fill(t, s, "b", 500, func(i int) []byte { return slice(t, i) })
	sn, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	defer sn.Close()
	if err := os.Truncate(path, 2*pageSize); err != nil {
		t.Fatal(err)
	}
	if _, err := sn.Get("b", "shop/object-000100"); !errors.Is(err, store.ErrDamaged) {
		t.Errorf("get: %v", err)
	}
	if err := sn.Scan("b", "", func(string, store.Header) error { return nil }); !errors.Is(err, store.ErrDamaged) {
		t.Errorf("scan: %v", err)
	}
	if _, err := s.Buckets(); err == nil {
		t.Error("buckets listed")
	}
	if s.Health() == nil {
		t.Error("healthy")
	}
	b := store.NewBatch()
	b.Put("b", "k", store.Record{})
	if err := s.Commit(t.Context(), b); !errors.Is(err, store.ErrDamaged) {
		t.Errorf("commit: %v", err)
	}
	sn.Close()
	if err := s.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if s = openTemp(t, store.Config{Path: path}); !s.Rebuilt() {
		t.Error("not rebuilt")
	}
}

// The same when the committer is the first to meet the page.
func TestUnreadablePagesFailTheCommit(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "store")
	s := openTemp(t, store.Config{Path: path})
	fill(t, s, "b", 500, func(i int) []byte { return slice(t, i) })
	if err := os.Truncate(path, 2*pageSize); err != nil {
		t.Fatal(err)
	}
	b := store.NewBatch()
	b.Put("b", "k", store.Record{})
	for range 2 {
		if err := s.Commit(t.Context(), b); !errors.Is(err, store.ErrDamaged) {
			t.Errorf("commit: %v", err)
		}
	}
	if s.Health() == nil {
		t.Error("healthy")
	}
	if err := s.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if s = openTemp(t, store.Config{Path: path}); !s.Rebuilt() {
		t.Error("not rebuilt")
	}
}
