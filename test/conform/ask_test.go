package conform

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/playground"
)

const (
	inJSON  = "application/json"
	inProto = "application/vnd.kubernetes.protobuf"

	asTable    = ";as=Table;v=v1;g=meta.k8s.io"
	asMetadata = ";as=PartialObjectMetadata;v=v1;g=meta.k8s.io"
	asMetaList = ";as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"
)

// question is a GET.
type question struct{ path, query, accept string }

func (q question) String() string { return q.path + "?" + q.query + " [" + q.accept + "]" }

// answer is what came back, to its end.
type answer struct {
	code   int
	header http.Header
	body   []byte
	// marks says that the bookmark that ends the initial events counts.
	// Other bookmarks come when they come.
	marks bool
}

func (s *side) open(ctx context.Context, q question) (*http.Response, error) {
	target := s.base + q.path
	if q.query != "" {
		target += "?" + q.query
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("User-Agent", "conform")
	if q.accept != "" {
		req.Header.Set("Accept", q.accept)
	}
	return s.http.Do(req)
}

func (s *side) ask(ctx context.Context, q question) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	resp, err := s.open(ctx, q)
	if err != nil {
		return answer{}, fmt.Errorf("%s: %s: %w", s.name, q, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return answer{}, fmt.Errorf("%s: %s: %w", s.name, q, err)
	}
	return answer{
		code: resp.StatusCode, header: resp.Header, body: body,
		marks: strings.Contains(q.query, "sendInitialEvents=true"),
	}, nil
}

func (s *side) mustAsk(t *testing.T, q question) answer {
	t.Helper()
	a, err := s.ask(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func (a answer) media() string { return a.header.Get("Content-Type") }

func (a answer) inProto() bool { return strings.HasPrefix(a.media(), inProto) }

func (a answer) watching() bool { return a.inProto() && strings.Contains(a.media(), "stream=watch") }

// status reads the body as a Status.
func (a answer) status() (metav1.Status, error) {
	var s metav1.Status
	if !a.inProto() {
		return s, json.Unmarshal(a.body, &s)
	}
	_, raw, err := envelope(a.body)
	if err != nil {
		return s, err
	}
	return s, s.Unmarshal(raw)
}

// digits are taken out of messages: they hold resource versions that move.
var digits = regexp.MustCompile(`\d+`)

// The metadata of a list, where built-in kinds and where custom ones have it.
var (
	listHead = regexp.MustCompile(`^(\{\s*"kind":\s*"\w+",\s*"apiVersion":\s*"[^"]+",\s*"metadata":\s*\{\s*)("resourceVersion":\s*"(\d+)")?`)
	listTail = regexp.MustCompile(`("metadata":\s*\{\s*"continue":\s*"[^"]*",\s*)(?:"remainingItemCount":\d+,)?"resourceVersion":\s*"(\d+)"\s*\}\s*\}\n?$`)
	token    = regexp.MustCompile(`"continue":"[^"]+"`)
	// Which event of a watch names the columns of its table is chance with
	// the API server, whose watchers share what was encoded for the first.
	columns  = regexp.MustCompile(`"columnDefinitions":(?:null|\[.*?\]),"rows"`)
	bookmark = regexp.MustCompile(`"resourceVersion":"\d+"`)
)

// plain is the answer as text, without what is allowed to differ: the version
// of a list and its continue token, which holds that version, the versions of
// bookmarks, and the digits in the message of an error.
func (a answer) plain() (string, error) {
	head := fmt.Sprintf("%d %s retry=%t\n", a.code, a.media(), a.header.Get("Retry-After") != "")
	switch {
	case a.code != http.StatusOK:
		s, err := a.status()
		if err != nil {
			return head + string(a.body), nil //nolint:nilerr // the API server has errors in plain text, too
		}
		s.Message = digits.ReplaceAllString(s.Message, "N")
		text, err := json.Marshal(s)
		return head + string(text), err
	case a.watching():
		text, err := plainFrames(a.body, a.marks)
		return head + text, err
	case a.inProto():
		text, err := plainProto(a.body)
		return head + text, err
	case bytes.HasPrefix(a.body, []byte(`{"type":"`)):
		var out strings.Builder
		marks := a.marks
		for line := range bytes.Lines(a.body) {
			if bytes.HasPrefix(line, []byte(`{"type":"BOOKMARK"`)) {
				if !marks {
					continue
				}
				marks = false
			}
			out.Write(plainEvent(line))
		}
		return head + out.String(), nil
	}
	body := a.body
	if m := listHead.FindSubmatchIndex(body); m != nil && m[4] >= 0 {
		body = append(append(bytes.Clone(body[:m[4]]), `"resourceVersion":"LIST"`...), body[m[5]:]...)
	} else if m := listTail.FindSubmatchIndex(body); m != nil {
		body = append(append(bytes.Clone(body[:m[4]]), "LIST"...), body[m[5]:]...)
	}
	return head + string(token.ReplaceAll(body, []byte(`"continue":"TOKEN"`))), nil
}

func plainEvent(line []byte) []byte {
	switch {
	case bytes.HasPrefix(line, []byte(`{"type":"BOOKMARK"`)):
		return columns.ReplaceAll(bookmark.ReplaceAll(line, []byte(`"resourceVersion":"MARK"`)), []byte(`"rows"`))
	case bytes.HasPrefix(line, []byte(`{"type":"ERROR"`)):
		return digits.ReplaceAll(line, []byte("N"))
	}
	return columns.ReplaceAll(line, []byte(`"rows"`))
}

// listVersion is the resource version of a list, 0 if it has none.
func (a answer) listVersion() (uint64, error) {
	if a.inProto() {
		_, raw, err := envelope(a.body)
		if err != nil {
			return 0, err
		}
		meta := field(raw, 1)
		return strconv.ParseUint(string(field(meta, 2)), 10, 64)
	}
	if m := listHead.FindSubmatch(a.body); m != nil && m[3] != nil {
		return strconv.ParseUint(string(m[3]), 10, 64)
	}
	if m := listTail.FindSubmatch(a.body); m != nil {
		return strconv.ParseUint(string(m[2]), 10, 64)
	}
	return 0, fmt.Errorf("no version in %.200s", a.body)
}

// envelope takes the API's protobuf envelope off.
func envelope(body []byte) (typeMeta, raw []byte, err error) {
	unknown, ok := bytes.CutPrefix(body, []byte("k8s\x00"))
	if !ok {
		return nil, nil, fmt.Errorf("no protobuf: %.40q", body)
	}
	return field(unknown, 1), field(unknown, 2), nil
}

// field returns the last value of a bytes field.
func field(message []byte, want protowire.Number) []byte {
	var out []byte
	for len(message) > 0 {
		num, typ, n := protowire.ConsumeField(message)
		if n < 0 {
			return nil
		}
		if num == want && typ == protowire.BytesType {
			_, _, tag := protowire.ConsumeTag(message)
			out, _ = protowire.ConsumeBytes(message[tag:])
		}
		message = message[n:]
		_ = typ
	}
	return out
}

// plainProto names each top-level field of the message, so that a difference
// is found, and leaves the version of a list out.
func plainProto(body []byte) (string, error) {
	typeMeta, raw, err := envelope(body)
	if err != nil {
		return "", err
	}
	if !strings.HasSuffix(string(field(typeMeta, 2)), "List") {
		return fmt.Sprintf("%q", body), nil
	}
	var out strings.Builder
	fmt.Fprintf(&out, "%q\n", typeMeta)
	for len(raw) > 0 {
		num, _, n := protowire.ConsumeField(raw)
		if n < 0 {
			return "", protowire.ParseError(n)
		}
		if num == 1 {
			_, _, tag := protowire.ConsumeTag(raw)
			meta, _ := protowire.ConsumeBytes(raw[tag:])
			for len(meta) > 0 {
				num, _, n := protowire.ConsumeField(meta)
				if n < 0 {
					return "", protowire.ParseError(n)
				}
				switch {
				case num == 2:
					out.WriteString("version\n")
				case num == 3 && n > 2:
					out.WriteString("token\n")
				default:
					fmt.Fprintf(&out, "meta %q\n", meta[:n])
				}
				meta = meta[n:]
			}
		} else {
			fmt.Fprintf(&out, "%d %q\n", num, raw[:n])
		}
		raw = raw[n:]
	}
	return out.String(), nil
}

// plainFrames does the same for the events of a watch.
func plainFrames(body []byte, marks bool) (string, error) {
	var out strings.Builder
	for len(body) > 0 {
		frame, rest, err := cutFrame(body)
		if err != nil {
			return "", err
		}
		body = rest
		if string(field(frame, 1)) == "BOOKMARK" {
			if !marks {
				continue
			}
			marks = false
		}
		text, err := plainFrame(frame)
		if err != nil {
			return "", err
		}
		out.WriteString(text)
	}
	return out.String(), nil
}

func cutFrame(body []byte) (frame, rest []byte, err error) {
	if len(body) < 4 {
		return nil, nil, io.ErrUnexpectedEOF
	}
	size := int(binary.BigEndian.Uint32(body))
	if len(body) < 4+size {
		return nil, nil, io.ErrUnexpectedEOF
	}
	return body[4 : 4+size], body[4+size:], nil
}

func plainFrame(frame []byte) (string, error) {
	typ := string(field(frame, 1))
	typeMeta, raw, err := envelope(field(field(frame, 2), 1))
	if err != nil {
		return "", err
	}
	switch typ {
	case "BOOKMARK":
		var p metav1.PartialObjectMetadata
		if err := p.Unmarshal(raw); err != nil {
			return "", err
		}
		p.ResourceVersion = "MARK"
		return fmt.Sprintf("%s %q %v\n", typ, typeMeta, p.ObjectMeta), nil
	case "ERROR":
		var s metav1.Status
		if err := s.Unmarshal(raw); err != nil {
			return "", err
		}
		return digits.ReplaceAllString(fmt.Sprintf("%s %v\n", typ, s), "N"), nil
	}
	return fmt.Sprintf("%q\n", frame), nil
}

// prose is the text that explains a column of a table.
var prose = regexp.MustCompile(`"description": ?"(?:[^"\\]|\\.)*"`)

// skewed reports whether the API server is of another version than the hub was
// made for. The columns of its tables must be the same then, while the prose
// that explains them is each version's own.
func skewed() bool {
	v, err := playground.ChosenVersions()
	return err == nil && v.ControlPlane != playground.KubernetesVersion
}

var errDiffers = errors.New("the hub's answer is not the API server's")

// differ explains how two answers differ, or returns nil.
func differ(want, got answer) error {
	w, err := want.plain()
	if err != nil {
		return fmt.Errorf("API server: %w", err)
	}
	g, err := got.plain()
	if err != nil {
		return fmt.Errorf("hub: %w", err)
	}
	if skewed() && strings.Contains(w, "columnDefinitions") {
		w, g = prose.ReplaceAllString(w, `"description":""`), prose.ReplaceAllString(g, `"description":""`)
	}
	if w == g {
		return nil
	}
	at := 0
	for at < len(w) && at < len(g) && w[at] == g[at] {
		at++
	}
	from := max(0, at-120)
	clip := func(s string) string { return s[min(from, len(s)):min(len(s), at+240)] }
	return fmt.Errorf("%w from byte %d on:\nAPI server: ...%s\nhub:        ...%s", errDiffers, at, clip(w), clip(g))
}

// same asks both sides until they say the same. The cluster is not quite
// still: controllers write now and then, and the replica follows.
func same(ctx context.Context, server, edge *side, q question) error {
	ctx, cancel := context.WithTimeout(ctx, 4*patience)
	defer cancel()
	for tries := 0; ; tries++ {
		want, err := server.ask(ctx, q)
		if err != nil {
			return err
		}
		got, err := edge.ask(ctx, q)
		if err != nil {
			return err
		}
		err = differ(want, got)
		if err == nil || tries == 5 {
			return err
		}
	}
}
