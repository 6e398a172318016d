package conform

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestDamageInALiveStoreIsFetchedAgain flips a bit of an object in the store
// of a hub that runs. Nobody is shown the damage, a watcher sees no gap, and
// the object is there again.
func TestDamageInALiveStoreIsFetchedAgain(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	run := t.TempDir()
	hub, _ := busy.hub(t, "edge-rot", "--run-dir", run)
	maps := busy.admin.CoreV1().ConfigMaps("conform-a")
	text := strings.Repeat("words that rot ", 20)
	object, err := maps.Create(ctx, &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "rots"}, Data: map[string]string{"text": text},
	}, metav1.CreateOptions{})
	do(t, err)
	defer func() { do(t, maps.Delete(context.WithoutCancel(ctx), "rots", metav1.DeleteOptions{})) }()
	_, edge := busy.sides(t, hub, "reader")
	const path = "/api/v1/namespaces/conform-a/configmaps"
	warm(t, edge, path)
	follow := question{path, "watch=true&resourceVersion=" + object.ResourceVersion, inJSON}
	stream, err := edge.open(ctx, follow)
	do(t, err)
	defer func() { stream.Body.Close() }()

	version, err := strconv.ParseUint(object.ResourceVersion, 10, 64)
	do(t, err)
	mustAwait(t, func(context.Context) error { return flip(storeFile(hub.Dir), "conform-a/rots", version) })
	mustAwait(t, func(ctx context.Context) error {
		a, err := edge.ask(ctx, question{path, "resourceVersion=0", inJSON})
		if err == nil && a.code == http.StatusOK && !bytes.Contains(a.body, []byte(text)) {
			t.Errorf("a list without what is damaged: %.300s", a.body)
		}
		if err == nil && a.code != http.StatusOK {
			err = fmt.Errorf("%d %.200s", a.code, a.body)
		}
		return errors.Join(err, counted(ctx, filepath.Join(run, "hub.sock"), "node_yurthub_store_damaged_total 1\n"))
	})

	// The next thing that the watcher sees is the next change. Its watch may
	// have ended, as watches do; it then goes on from where it was.
	object.Data["text"] = "fresh"
	_, err = maps.Update(ctx, object, metav1.UpdateOptions{})
	do(t, err)
	line, err := bufio.NewReader(stream.Body).ReadBytes('\n')
	if errors.Is(err, io.EOF) && len(line) == 0 {
		again, openErr := edge.open(ctx, follow)
		do(t, openErr)
		stream.Body.Close()
		stream = again
		line, err = bufio.NewReader(stream.Body).ReadBytes('\n')
	}
	if err != nil || !bytes.Contains(line, []byte(`"MODIFIED"`)) || !bytes.Contains(line, []byte(`"fresh"`)) {
		t.Errorf("watcher sees %.300s, %v", line, err)
	}
}

// flip flips a bit in the stored form of an object's version, once it is on
// disk.
func flip(name, key string, version uint64) error {
	data, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	// A value follows its key: the number of its format, two bytes, the
	// version, more of a header of 35 bytes, the sealed object.
	const atVersion, intoObject = 3, 35 + 20
	hits := 0
	for at := 0; ; {
		i := bytes.Index(data[at:], []byte(key))
		if i < 0 {
			break
		}
		at += i + len(key)
		if data[at] != 1 || binary.LittleEndian.Uint64(data[at+atVersion:]) != version {
			continue
		}
		if _, err := f.WriteAt([]byte{data[at+intoObject] ^ 0x40}, int64(at+intoObject)); err != nil {
			return err
		}
		hits++
	}
	if hits == 0 {
		return fmt.Errorf("%s at %d is not in the store", key, version)
	}
	return nil
}

// counted asks the hub's socket for a line of its metrics.
func counted(ctx context.Context, socket, line string) error {
	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://hub/metrics", nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && !bytes.Contains(text, []byte(line)) {
		err = fmt.Errorf("metrics lack %q", line)
	}
	return err
}
