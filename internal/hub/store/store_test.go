package store_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/yurt-edge/yurt/internal/hub/store"
	"github.com/yurt-edge/yurt/internal/hub/store/storetest"
)

func TestMain(m *testing.M) {
	if ran, err := child(); ran {
		if err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func testKey() []byte { return bytes.Repeat([]byte{7}, 32) }

func TestConformance(t *testing.T) {
	storetest.Run(t, func(t *testing.T, path string) *store.Store {
		s, err := store.Open(t.Context(), store.Config{Path: path, Key: testKey()})
		if err != nil {
			t.Fatal(err)
		}
		return s
	})
}

// noise returns n bytes that do not compress.
func noise(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{9}).Read(b)
	return b
}
