package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/runtime"
)

// watcher reads one watch and tells of every numbered update that arrives.
type watcher struct {
	conn *conn
	end  error
	done chan struct{}
}

// watch starts a watch at a resource version. It returns once the server has
// answered; seen is called on the watcher's goroutine until ctx ends.
func (t target) watch(ctx context.Context, path, version string, seen func(update int)) (*watcher, error) {
	w := &watcher{conn: t.connect(), done: make(chan struct{})}
	//nolint:bodyclose // the goroutine below closes it
	resp, err := w.conn.open(ctx, http.MethodGet, path+"?watch=1&resourceVersion="+version, protobuf+";stream=watch", nil, "")
	if err != nil {
		return nil, err
	}
	go func() { // ends with the stream or with ctx
		defer close(w.done)
		defer w.conn.close()
		defer resp.Body.Close()
		w.end = w.read(resp.Body, seen)
	}()
	return w, nil
}

func (w *watcher) read(body io.Reader, seen func(int)) error {
	in := bufio.NewReaderSize(body, 64<<10)
	var length [4]byte
	for {
		if _, err := io.ReadFull(in, length[:]); err != nil {
			return err
		}
		n := int(binary.BigEndian.Uint32(length[:]))
		if n > cap(w.conn.buf) {
			w.conn.buf = make([]byte, n)
		}
		frame := w.conn.buf[:n]
		if _, err := io.ReadFull(in, frame); err != nil {
			return err
		}
		if u := updateIn(frame); u >= 0 {
			seen(u)
		}
	}
}

// alive reports whether the stream still stands.
func (w *watcher) alive() bool {
	select {
	case <-w.done:
		return false
	default:
		return true
	}
}

// writer updates slices at a steady pace and keeps when it did so.
type writer struct {
	target target
	path   string   // of the list
	bodies [][]byte // one per object: the object with the mark of its update
	marks  []int    // where the number stands in each body
	sent   []atomic.Int64
	next   int // the number of the next update; 0 is what was created
	base   time.Time
}

// newWriter writes to objects count objects of a namespace, at most most
// times in all.
func (b *bench) newWriter(namespace string, endpoints, objects, most int) (*writer, error) {
	return b.newWriterOf(namespace, objects, most, func(name string) runtime.Object { return newSlice(namespace, name, endpoints) })
}

// newWriterOf writes to EndpointSlices as build made them.
func (b *bench) newWriterOf(namespace string, objects, most int, build func(name string) runtime.Object) (*writer, error) {
	w := &writer{
		target: b.direct(), path: fmt.Sprintf(slicePath, namespace), next: 1,
		sent: make([]atomic.Int64, most+1), base: time.Now(),
	}
	for i := range objects {
		body, err := encode(build(fmt.Sprintf("object-%05d", i)))
		if err != nil {
			return nil, err
		}
		at := markIn(body)
		if at < 0 {
			return nil, errors.New("an object has no mark")
		}
		w.bodies, w.marks = append(w.bodies, body), append(w.marks, at)
	}
	return w, nil
}

func (w *writer) now() int64 { return int64(time.Since(w.base)) }

// write makes n updates, perSecond of them in a second, or as many as can be
// made if perSecond is 0. It returns the number of the first and the pace.
func (w *writer) write(ctx context.Context, n, perSecond int) (first int, pace float64, err error) {
	const writers = 8 // each has objects of its own, so that none conflict
	first = w.next
	start := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for i := range writers {
		g.Go(func() error {
			c := w.target.connect()
			defer c.close()
			for k := i; k < n; k += writers {
				if perSecond > 0 {
					due := start.Add(time.Duration(k) * time.Second / time.Duration(perSecond))
					if err := pause(ctx, time.Until(due)); err != nil {
						return err
					}
				}
				number := first + k
				object := k % len(w.bodies)
				body := append([]byte(nil), w.bodies[object]...)
				copy(body[w.marks[object]:], fmt.Appendf(nil, "%0*d", marked, number))
				w.sent[number].Store(w.now())
				path := fmt.Sprintf("%s/object-%05d", w.path, object)
				if _, err := c.send(ctx, http.MethodPut, path, protobuf, body, protobuf); err != nil {
					return err
				}
			}
			return nil
		})
	}
	err = g.Wait()
	w.next = first + n
	return first, float64(n) / time.Since(start).Seconds(), err
}

// audience are watchers of one target and when each got which update.
type audience struct {
	watchers []*watcher
	got      [][]atomic.Int64 // by watcher and update
	left     sync.WaitGroup
	cancel   context.CancelFunc
}

// audience starts n watchers that each wait for updates first to last.
func (w *writer) audience(ctx context.Context, t target, n, first, updates int) (*audience, error) {
	c := t.connect()
	defer c.close()
	_, version, err := c.list(ctx, w.path+"?resourceVersion=0")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	a := &audience{cancel: cancel, got: make([][]atomic.Int64, n)}
	for i := range n {
		got := make([]atomic.Int64, updates)
		a.got[i] = got
		a.left.Add(updates)
		watcher, err := t.watch(ctx, w.path, version, func(update int) {
			k := update - first
			if k >= 0 && k < updates && got[k].CompareAndSwap(0, w.now()) {
				a.left.Done()
			}
		})
		if err != nil {
			cancel()
			return nil, err
		}
		a.watchers = append(a.watchers, watcher)
	}
	return a, nil
}

// wait returns once every watcher has every update.
func (a *audience) wait(ctx context.Context, budget time.Duration) error {
	all := make(chan struct{})
	go func() { // ends with the last update, or is left behind on failure
		defer close(all)
		a.left.Wait()
	}()
	select {
	case <-all:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(budget):
		missing := 0
		for _, got := range a.got {
			for k := range got {
				if got[k].Load() == 0 {
					missing++
				}
			}
		}
		return fmt.Errorf("%d deliveries missing after %s, %d of %d streams broken", missing, budget, a.broken(), len(a.watchers))
	}
}

func (a *audience) broken() int {
	n := 0
	for _, w := range a.watchers {
		if !w.alive() {
			n++
		}
	}
	return n
}

func (a *audience) close() {
	a.cancel()
	for _, w := range a.watchers {
		<-w.done
	}
}
