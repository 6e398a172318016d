package secrets

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// pieceSize is how much of a secret, in any form, must not be found. Random
// text of that size is nowhere by chance.
const pieceSize = 12

// finder knows secrets and finds them again.
type finder struct {
	mu     sync.Mutex // guards pieces
	pieces map[[8]byte][]piece
}

type piece struct {
	name string
	text []byte
}

func newFinder() *finder { return &finder{pieces: map[[8]byte][]piece{}} }

// random returns n letters and digits that nobody has seen.
func random(n int) string {
	out := make([]byte, n)
	_, _ = rand.Read(out)
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789AB"
	for i, b := range out {
		out[i] = letters[b%64]
	}
	return string(out)
}

// plant returns a new secret that f will find.
func (f *finder) plant(name string) string {
	s := random(40)
	f.know(name, s)
	return s
}

// know makes f find s.
func (f *finder) know(name, s string) {
	escaped, _ := json.Marshal(s) // a string always can be
	for what, form := range map[string]string{
		"plain": s, "json": string(escaped[1 : len(escaped)-1]), "quoted": strconv.Quote(s), "url": url.QueryEscape(s),
		"hex": hex.EncodeToString([]byte(s)), "HEX": strings.ToUpper(hex.EncodeToString([]byte(s))),
	} {
		f.add(name+" "+what, form)
	}
	for _, e := range []*base64.Encoding{base64.StdEncoding, base64.URLEncoding} {
		for _, once := range aligned(e, s) {
			f.add(name+" base64", once)
			for _, twice := range aligned(e, once) {
				f.add(name+" base64 of base64", twice)
			}
		}
	}
}

// aligned returns the parts of s in base64 that do not depend on what stands
// before and after it, for each of the three places where it can begin.
func aligned(e *base64.Encoding, s string) []string {
	var out []string
	for before := range 3 {
		text := e.EncodeToString(append(make([]byte, before), s...))
		end := (before + len(s)) / 3 * 4
		out = append(out, text[(before+2)/3*4:end])
	}
	return out
}

func (f *finder) add(name, form string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for at := 0; at < len(form); at += pieceSize {
		p := piece{name, []byte(form[at:min(at+pieceSize, len(form))])}
		if len(p.text) < pieceSize && at > 0 || len(p.text) < len([8]byte{}) {
			break
		}
		f.pieces[[8]byte(p.text)] = append(f.pieces[[8]byte(p.text)], p)
	}
}

// find returns the names of the secrets in data, and in what is compressed in
// data.
func (f *finder) find(data []byte) map[string]bool {
	found := map[string]bool{}
	f.search(data, found)
	f.unpack(data, found)
	return found
}

func (f *finder) search(data []byte, found map[string]bool) {
	for at := 0; at+8 <= len(data); at++ {
		for _, p := range f.pieces[[8]byte(data[at:])] {
			if bytes.HasPrefix(data[at:], p.text) {
				found[p.name] = true
			}
		}
	}
}

// unpack tries to decompress at every place where a compressed stream could
// begin. Blocks of s2 have no such mark; in them random text stands as it is.
func (f *finder) unpack(data []byte, found map[string]bool) {
	for at := 0; at+4 <= len(data); at++ {
		var (
			r   io.Reader
			err error
			in  = bytes.NewReader(data[at:])
		)
		switch head := binary.BigEndian.Uint32(data[at:]); {
		case head>>8 == 0x1f8b08:
			r, err = gzip.NewReader(in)
		case head>>24 == 0x78 && (head>>16)%31 == 0:
			r, err = zlib.NewReader(in)
		case head == 0x28b52ffd:
			r, err = zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(64<<20))
		case head == 0xff060000:
			r = s2.NewReader(in)
		default:
			continue
		}
		if err != nil {
			continue
		}
		plain, _ := io.ReadAll(io.LimitReader(r, 16<<20)) // what came before an error counts
		f.search(plain, found)
		if z, ok := r.(*zstd.Decoder); ok {
			z.Close()
		}
	}
}

// tree finds secrets in all files below dir and returns the files by secret,
// and how many bytes it read. It leaves out the files that except names.
func (f *finder) tree(t *testing.T, dir string, except func(name string) bool) (found map[string][]string, size int) {
	t.Helper()
	found = map[string][]string{}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || except != nil && except(d.Name()) {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		size += len(data)
		for name := range f.find(data) {
			found[name] = append(found[name], path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found, size
}

// TestFinderFinds hides a secret in every form, at every alignment, within
// other data.
func TestFinderFinds(t *testing.T) {
	f := newFinder()
	secret := f.plant("x") + "\"<&>\\\n\u00fc" + random(3)
	noise := make([]byte, 1<<16)
	_, _ = rand.Read(noise)
	if found := f.find(noise); len(found) > 0 {
		t.Errorf("found in noise: %v", found)
	}
	pack := func(open func(io.Writer) io.WriteCloser) func(string) string {
		return func(s string) string {
			var buf bytes.Buffer
			w := open(&buf)
			_, err := w.Write([]byte(strings.Repeat("filler ", 300) + s + strings.Repeat("filler ", 300)))
			if err != nil || w.Close() != nil {
				t.Fatal(err)
			}
			return buf.String()
		}
	}
	in64 := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	for name, form := range map[string]func(string) string{
		"plain": func(s string) string { return s },
		"json": func(s string) string {
			text, err := json.Marshal(map[string]string{"a": s})
			if err != nil {
				t.Fatal(err)
			}
			return string(text)
		},
		"json of bytes": func(s string) string {
			text, err := json.Marshal(map[string][]byte{"a": []byte(s)})
			if err != nil {
				t.Fatal(err)
			}
			return string(text)
		},
		"quoted": strconv.Quote,
		"url":    url.QueryEscape,
		"hex":    func(s string) string { return hex.EncodeToString([]byte(s)) },
		"base64": in64,
		"twice":  func(s string) string { return in64("{" + in64(s) + "}") },
		"gzip":   pack(func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) }),
		"zlib":   pack(func(w io.Writer) io.WriteCloser { return zlib.NewWriter(w) }),
		"s2":     pack(func(w io.Writer) io.WriteCloser { return s2.NewWriter(w) }),
		"zstd": pack(func(w io.Writer) io.WriteCloser {
			z, err := zstd.NewWriter(w)
			if err != nil {
				t.Fatal(err)
			}
			return z
		}),
		"s2 block": func(s string) string {
			return string(s2.Encode(nil, []byte(strings.Repeat("filler ", 300)+s+strings.Repeat("filler ", 300))))
		},
		"half of it": func(s string) string { return s[9:33] },
	} {
		for before := range 4 {
			hidden := string(noise[:1000+before]) + form(strings.Repeat("-", before)+secret) + string(noise[:1000])
			if len(f.find([]byte(hidden))) == 0 {
				t.Errorf("%s, %d before: not found", name, before)
			}
		}
	}
}
