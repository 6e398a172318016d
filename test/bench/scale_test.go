package main

import (
	"bytes"
	"encoding/json"
	"log"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	if worker, err := beWorker(); worker {
		if err != nil {
			log.Fatal("worker: ", err)
		}
		return
	}
	os.Exit(m.Run())
}

// TestScale runs `bench -scale` with a handful of hubs: all is measured, and
// what does not depend on the size or on the machine is as it should be.
func TestScale(t *testing.T) {
	figures := filepath.Join(t.TempDir(), "figures.json")
	var table, told bytes.Buffer
	err := run(t.Context(), options{
		scaled: true, cut: 2 * time.Second, json: figures,
		scale: scale{pools: 2, hubs: 3, slices: 5, changes: 3, objects: 20, uplink: 3, leases: 40, quiet: 1500 * time.Millisecond, settle: 3 * time.Second, spread: time.Second},
	}, &table, &told)
	if err != nil {
		t.Fatalf("%v\n%s", err, told.Bytes())
	}
	t.Logf("%s", table.Bytes())
	text, err := os.ReadFile(figures)
	if err != nil {
		t.Fatal(err)
	}
	var rows []Row
	if err := json.Unmarshal(text, &rows); err != nil {
		t.Fatal(err)
	}
	must := map[string]bool{ // by what is measured, without the size
		"fleet: all uplinks cut for 2s, every slice changed: streams of local watchers that ended":             false,
		"fleet: all uplinks cut for 2s, every slice changed: requests that the API server refused":             false,
		"uplink: bytes of a pool of 3 machines, of one machine's: what they share, first start of all at once": false,
		"uplink: bytes of a pool of 3 machines, of one machine's: what they share, every slice changed once":   false,
		"leases: leases that lapsed while they were vouched for":                                               false,
	}
	for _, r := range rows {
		name := r.Section + ": " + r.What
		if _, ok := must[name]; ok {
			must[name] = true
			if r.OK == nil || !*r.OK {
				t.Errorf("%s: off %s, on %s, ratio %s, want %s", name, number(r.Direct), number(r.Hub), number(r.Ratio), r.Bar)
			}
		}
	}
	for name, found := range must {
		if !found {
			t.Errorf("no row %q", name)
		}
	}
}
