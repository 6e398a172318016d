package nodebucket

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/api/apps/v1alpha1"
)

func bucket(name string, nodes ...string) v1alpha1.NodeBucket {
	b := with(v1alpha1.NodeBucket{}, nodes)
	b.ObjectMeta = metav1.ObjectMeta{Name: name}
	return b
}

// apply does what the change says, and returns the buckets.
func apply(buckets []v1alpha1.NodeBucket, c change, number *int) []v1alpha1.NodeBucket {
	byName := map[string]v1alpha1.NodeBucket{}
	for _, b := range buckets {
		byName[b.Name] = b
	}
	for _, b := range c.update {
		byName[b.Name] = b
	}
	for _, b := range c.remove {
		delete(byName, b.Name)
	}
	for _, b := range c.create {
		*number++
		b.Name = fmt.Sprintf("b%d", *number)
		byName[b.Name] = b
	}
	var out []v1alpha1.NodeBucket
	for _, b := range byName {
		out = append(out, b)
	}
	return out
}

// TestDistributeRandomly follows pools whose nodes come and go: each node is in
// one bucket, no bucket is empty or too large, what has not changed is not
// written, and one node more or less is one write.
func TestDistributeRandomly(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		most := 1 + r.IntN(5)
		var buckets []v1alpha1.NodeBucket
		number := 0
		nodes := map[string]bool{}
		for range 40 {
			turns := 1
			if r.IntN(4) == 0 {
				turns = 10
			}
			for range turns {
				n := fmt.Sprintf("n%d", r.IntN(30))
				nodes[n] = !nodes[n]
			}
			var names []string
			for n, in := range nodes {
				if in {
					names = append(names, n)
				}
			}
			c := distribute(names, buckets, most)
			if writes := len(c.create) + len(c.update) + len(c.remove); turns == 1 && writes > 1 {
				t.Fatalf("seed %d: one node changed, %d writes", seed, writes)
			}
			buckets = apply(buckets, c, &number)
			var got []string
			for _, b := range buckets {
				if len(b.Nodes) == 0 || len(b.Nodes) > most || int(b.NumNodes) != len(b.Nodes) {
					t.Fatalf("seed %d: bucket %+v", seed, b)
				}
				for _, n := range b.Nodes {
					got = append(got, n.Name)
				}
			}
			slices.Sort(got)
			slices.Sort(names)
			if !slices.Equal(got, names) {
				t.Fatalf("seed %d: got %v, want %v", seed, got, names)
			}
			if c := distribute(names, buckets, most); len(c.create)+len(c.update)+len(c.remove) > 0 {
				t.Fatalf("seed %d: a second look changes %+v", seed, c)
			}
		}
	}
}

func TestDistribute(t *testing.T) {
	for name, tc := range map[string]struct {
		nodes   []string
		buckets []v1alpha1.NodeBucket
		want    string // created, updated, removed
	}{
		"a node there twice":             {[]string{"a", "b"}, []v1alpha1.NodeBucket{bucket("1", "a"), bucket("2", "a", "b")}, "[] [2:[b]] []"},
		"an emptied bucket is used":      {[]string{"b"}, []v1alpha1.NodeBucket{bucket("1", "a")}, "[] [1:[b]] []"},
		"a changed bucket is filled":     {[]string{"a", "c", "d"}, []v1alpha1.NodeBucket{bucket("1", "c"), bucket("2", "a", "b")}, "[] [2:[a d]] []"},
		"a bucket that is too large":     {[]string{"a", "b", "c"}, []v1alpha1.NodeBucket{bucket("1", "a", "b", "c")}, "[:[c]] [1:[a b]] []"},
		"a wrong number is put right":    {[]string{"a"}, []v1alpha1.NodeBucket{{Nodes: []v1alpha1.Node{{Name: "a"}}, NumNodes: 5}}, "[] [:[a]] []"},
		"an empty bucket goes":           {nil, []v1alpha1.NodeBucket{bucket("1")}, "[] [] [1:[]]"},
		"nothing where nothing is to do": {nil, nil, "[] [] []"},
	} {
		c := distribute(tc.nodes, tc.buckets, 2)
		show := func(buckets []v1alpha1.NodeBucket) []string {
			out := []string{}
			for _, b := range buckets {
				names := []string{}
				for _, n := range b.Nodes {
					names = append(names, n.Name)
				}
				out = append(out, fmt.Sprintf("%s:%v", b.Name, names))
			}
			return out
		}
		if got := fmt.Sprint(show(c.create), show(c.update), show(c.remove)); got != tc.want {
			t.Errorf("%s: got %s, want %s", name, got, tc.want)
		}
	}
}
