package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/yurt-edge/yurt/test/bed"
)

// start measures how soon a hub that lost its power answers, and what it
// keeps on disk to do so.
func (b *bench) start(ctx context.Context) error {
	held := map[int]float64{}
	for _, n := range []int{10, 1000, 10000} {
		namespace := fmt.Sprintf("start-%d", n)
		if err := b.maps(ctx, namespace, n, 512); err != nil {
			return err
		}
		h, err := b.startHub(ctx, true)
		if err != nil {
			return err
		}
		err = b.startWith(ctx, h, namespace, n, held)
		h.close()
		if err != nil {
			return err
		}
	}
	b.hub("disk held per object of 0.5 KB", "bytes", (held[10000]-held[10])/(10000-10), atMost(1024), "files of the store, 10 000 objects less 10")
	return nil
}

func (b *bench) startWith(ctx context.Context, h *hub, namespace string, n int, held map[int]float64) error {
	path := fmt.Sprintf(mapPath, namespace)
	if err := h.holds(ctx, path, n); err != nil {
		return err
	}
	c := h.user.connect()
	defer c.close()
	one := path + "/object-00000?resourceVersion=0"
	if _, err := c.get(ctx, one, protobuf); err != nil { // asks for the right, too
		return err
	}
	if err := h.quiet(ctx); err != nil {
		return err
	}
	var err error
	if held[n], err = diskUsage(h.Dir + "/store"); err != nil {
		return err
	}
	for _, mode := range []bed.Mode{bed.Blackhole, bed.Whole} {
		way, most := "online", bar{}
		if mode == bed.Blackhole {
			way, most = "cut", atMost(200)
		}
		var first, full []float64
		for range pick(b, 5, 2) {
			h.Kill()
			if err := h.link.Cut(mode); err != nil {
				return err
			}
			begin := time.Now()
			if err := h.Launch(); err != nil {
				return err
			}
			if err := h.answers(ctx, one); err != nil {
				return err
			}
			first = append(first, ms(int64(time.Since(begin))))
			if err := h.holds(ctx, path, n); err != nil {
				return err
			}
			full = append(full, ms(int64(time.Since(begin))))
		}
		b.hub(fmt.Sprintf("started after kill -9, to first GET, %d objects, link %s", n, way), "ms", median(first), most, "process start included")
		b.hub(fmt.Sprintf("started after kill -9, to a full LIST as JSON metadata, %d objects, link %s", n, way), "ms", median(full), bar{}, "")
	}
	return nil
}

// answers waits until the hub answers at path.
func (h *hub) answers(ctx context.Context, path string) error {
	c := h.user.connect()
	defer c.close()
	var last error
	err := until(ctx, 30*time.Second, time.Millisecond, func() (bool, error) {
		_, last = c.get(ctx, path, protobuf)
		return last == nil, nil
	})
	if err != nil {
		return fmt.Errorf("%w: %w", err, last)
	}
	return nil
}

// informers measures client-go's own informer on a hub that has just started.
func (b *bench) informers(ctx context.Context) error {
	const objects = 1000
	namespace := fmt.Sprintf("start-%d", objects)
	if err := b.maps(ctx, namespace, objects, 512); err != nil {
		return err
	}
	h, err := b.startHub(ctx, true)
	if err != nil {
		return err
	}
	defer h.close()
	direct := b.cloud.RESTConfig()
	direct.CertFile, direct.CertData, direct.BearerToken = "", nil, b.token
	direct.KeyFile, direct.KeyData = "", nil
	direct.ContentType = protobuf
	through, err := h.RESTConfig(direct)
	if err != nil {
		return err
	}
	for _, fresh := range []bool{false, true} {
		var times rounds
		for i := range pick(b, 7, 3) {
			if err := h.quiet(ctx); err != nil {
				return err
			}
			h.Kill()
			if fresh {
				if err := h.forget(); err != nil {
					return err
				}
			}
			if err := h.Start(ctx); err != nil {
				return err
			}
			var round [2]float64
			for j := range 2 {
				which := (i + j) % 2
				if round[which], err = informer(ctx, []*rest.Config{direct, through}[which], namespace, objects); err != nil {
					return err
				}
			}
			times = append(times, round)
		}
		what := "held from before"
		if fresh {
			what = "not held yet"
		}
		b.pair("1 000 objects, hub just started, "+what, "ms", times, ratioAtMost(1.2), "")
	}
	return nil
}

// informer returns the milliseconds until a new informer has synced.
func informer(ctx context.Context, cfg *rest.Config, namespace string, objects int) (float64, error) {
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return 0, fmt.Errorf("start informer: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	begin := time.Now()
	store, controller := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: cache.ToListWatcherWithWatchListSemantics(
			cache.NewListWatchFromClient(client.CoreV1().RESTClient(), "configmaps", namespace, fields.Everything()), client),
		ObjectType: &corev1.ConfigMap{}, Handler: cache.ResourceEventHandlerFuncs{},
	})
	go controller.RunWithContext(ctx) // ends with ctx
	err = until(ctx, time.Minute, time.Millisecond, func() (bool, error) { return controller.HasSynced(), nil })
	took := ms(int64(time.Since(begin)))
	if n := len(store.ListKeys()); err == nil && n < objects {
		err = fmt.Errorf("informer synced with %d of %d objects", n, objects)
	}
	return took, err
}

// kills ends the hub by force while it works, and looks whether it then lies.
func (b *bench) kills(ctx context.Context) error {
	const objects, kills = 1000, 20
	err := b.create(ctx, slicePath, "kill", objects, smallSliceIn("kill"))
	if err != nil {
		return err
	}
	h, err := b.startHub(ctx, true)
	if err != nil {
		return err
	}
	defer h.close()
	path := fmt.Sprintf(slicePath, "kill")
	w, err := b.newWriter("kill", 2, objects, 1000000)
	if err != nil {
		return err
	}
	writing, stop := context.WithCancel(ctx)
	written := make(chan error, 1)
	go func() { // ends with writing
		var err error
		for writing.Err() == nil && err == nil {
			_, _, err = w.write(writing, 1000, 400)
		}
		written <- err
	}()
	defer func() { stop(); <-written }() //nolint:errcheck // stop cuts the last write short
	wrong, refused := 0, 0
	for i := range kills {
		// In half of the rounds the kill falls into the first sync, in the
		// others into the stream of updates.
		if first := i%2 == 0; first {
			h.Kill()
			if err := h.forget(); err != nil {
				return err
			}
			if err := h.Start(ctx); err != nil {
				return err
			}
		} else if err := h.holds(ctx, path, objects); err != nil {
			return err
		}
		if err := pause(ctx, rand.N(400*time.Millisecond)); err != nil {
			return err
		}
		h.Kill()
		if err := h.link.Cut(bed.Down); err != nil {
			return err
		}
		if err := h.Start(ctx); err != nil {
			return err
		}
		names, err := h.listed(ctx, path)
		switch {
		case err != nil:
			refused++
		case len(names) != objects:
			wrong++
			fmt.Fprintf(b.log, "kill %d: the hub answered with %d of %d objects\n", i, len(names), objects)
		}
		if err := h.link.Heal(); err != nil {
			return err
		}
	}
	b.hub(fmt.Sprintf("kill -9 under load, %d times: answers 200 with objects missing", kills), "", float64(wrong), atMost(0),
		fmt.Sprintf("%d honest refusals, where the first sync was not over", refused))
	return nil
}

// listed lists once, after the hub has answered anything but a network error.
func (h *hub) listed(ctx context.Context, path string) (names []string, err error) {
	c := h.user.connect()
	defer c.close()
	uerr := until(ctx, 10*time.Second, 5*time.Millisecond, func() (bool, error) {
		names, _, err = c.list(ctx, path+"?resourceVersion=0")
		var status *statusError
		return err == nil || errors.As(err, &status), nil
	})
	return names, errors.Join(err, uerr)
}
