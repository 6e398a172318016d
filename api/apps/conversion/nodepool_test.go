package conversion

import (
	"encoding/json"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/equality"
	metafuzzer "k8s.io/apimachinery/pkg/apis/meta/fuzzer"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"sigs.k8s.io/randfill"

	"github.com/yurt-edge/yurt/api/apps/v1beta1"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
)

// roundTrip converts random objects there and back. Each is passed through
// JSON first, since nothing else ever reaches a conversion.
func roundTrip[A, B any](t *testing.T, there func(*A) (*B, error), back func(*B) (*A, error)) {
	t.Helper()
	codecs := serializer.NewCodecFactory(runtime.NewScheme())
	for seed := range int64(500) {
		f := randfill.NewWithSeed(seed).NilChance(.4).NumElements(1, 3).Funcs(metafuzzer.Funcs(codecs)...)
		var raw, in A
		f.Fill(&raw)
		text, err := json.Marshal(&raw)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(text, &in); err != nil {
			t.Fatal(err)
		}
		other, err := there(&in)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		wire, err := json.Marshal(other)
		if err != nil {
			t.Fatal(err)
		}
		var came B
		if err := json.Unmarshal(wire, &came); err != nil {
			t.Fatal(err)
		}
		out, err := back(&came)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if !equality.Semantic.DeepEqual(&in, out) {
			got, _ := json.Marshal(out)
			want, _ := json.Marshal(&in)
			t.Fatalf("seed %d:\n got %s\nwant %s", seed, got, want)
		}
	}
}

func TestRoundTrips(t *testing.T) {
	t.Run("v1beta2 by v1beta1", func(t *testing.T) { roundTrip(t, StoredToV1beta1, V1beta1ToStored) })
	t.Run("v1beta1 by v1beta2", func(t *testing.T) { roundTrip(t, V1beta1ToStored, StoredToV1beta1) })
	t.Run("v1beta2 by v1alpha1", func(t *testing.T) { roundTrip(t, StoredToV1alpha1, V1alpha1ToStored) })
	t.Run("v1alpha1 by v1beta2", func(t *testing.T) { roundTrip(t, V1alpha1ToStored, StoredToV1alpha1) })
}

// TestClientsOfOldVersionsChangeOnlyWhatTheyMean is a read, a change and a
// write by a client that knows nothing of what v1beta2 has.
func TestClientsOfOldVersionsChangeOnlyWhatTheyMean(t *testing.T) {
	stored := &v1beta2.NodePool{}
	stored.Name = "hangzhou"
	stored.Spec.HostNetwork, stored.Spec.EnableLeaderElection, stored.Spec.LeaderReplicas = true, true, 3
	old, err := StoredToV1alpha1(stored)
	if err != nil {
		t.Fatal(err)
	}
	if old.Annotations[hostNetwork] != "true" {
		t.Errorf("v1alpha1 does not tell of the host's network: %v", old.Annotations)
	}
	old.Spec.Labels = map[string]string{"shop": "1"}
	old.Annotations[hostNetwork] = "false"
	got, err := V1alpha1ToStored(old)
	if err != nil {
		t.Fatal(err)
	}
	want := stored.DeepCopy()
	want.Spec.Labels, want.Spec.HostNetwork = map[string]string{"shop": "1"}, false
	if !equality.Semantic.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// TestPoolsOfOldHaveDefaults is a pool that was never written as v1beta2: it has
// what the API server gives to one that is, and it costs no annotation.
func TestPoolsOfOldHaveDefaults(t *testing.T) {
	old := &v1beta1.NodePool{Spec: v1beta1.NodePoolSpec{Type: "Edge"}}
	stored, err := V1beta1ToStored(old)
	if err != nil {
		t.Fatal(err)
	}
	if s := stored.Spec; s.LeaderElectionStrategy != v1beta2.ElectRandom || s.LeaderReplicas != 1 || len(s.PoolScopeMetadata) != 2 || s.EnableLeaderElection {
		t.Errorf("got %+v", s)
	}
	if back, err := StoredToV1beta1(stored); err != nil || !equality.Semantic.DeepEqual(back, old) {
		t.Errorf("got %+v, %v", back, err)
	}
}

func TestGarbageInTheAnnotationIsNamed(t *testing.T) {
	old := &v1beta1.NodePool{}
	old.Annotations = map[string]string{CarriedV1beta2: "{"}
	if _, err := V1beta1ToStored(old); err == nil || !strings.Contains(err.Error(), CarriedV1beta2) {
		t.Errorf("got %v", err)
	}
}
