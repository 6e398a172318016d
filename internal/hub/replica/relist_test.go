package replica

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestRelistKeepsNoObjects has all objects of a large scope change while the
// cloud's history is lost. Once the differences are written, the heap holds the
// window and no more.
func TestRelistKeepsNoObjects(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, nil)
		defer func() { b.stop() }()
		const objects, size = 2000, 10 << 10
		fill := func(text string) {
			value := strings.Repeat(text, size)
			for i := range objects {
				b.cloud.put("configmaps", "ns", fmt.Sprint(i), value, nil)
			}
		}
		live := func() int {
			var m runtime.MemStats
			runtime.GC()
			runtime.GC() // pools are empty after the second
			runtime.ReadMemStats(&m)
			return int(m.HeapAlloc)
		}
		fill("a")
		b.sync(configMaps)
		pass(5 * time.Second)
		b.cloud.cut()
		fill("b")
		b.cloud.compact()
		before := live()
		b.cloud.heal()
		pass(time.Minute)
		b.current(b.held(configMaps))
		if grown := live() - before; grown > 3*windowBytes {
			t.Errorf("%d MB more on the heap after a relist of %d MB, a window is %d MB", grown>>20, objects*size>>20, windowBytes>>20)
		}
	})
}
