package store_test

import (
	"bytes"
	"testing"

	"go.uber.org/goleak"

	"github.com/yurt-edge/yurt/internal/hub/store"
	"github.com/yurt-edge/yurt/internal/hub/store/storetest"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

func testKey() []byte { return bytes.Repeat([]byte{7}, 32) }

func TestConformance(t *testing.T) {
	storetest.Run(t, func(t *testing.T, path string) *store.Store {
		s, err := store.Open(store.Config{Path: path, Key: testKey()})
		if err != nil {
			t.Fatal(err)
		}
		return s
	})
}
