package nodebucket

import (
	"cmp"
	"maps"
	"slices"

	"github.com/yurt-edge/yurt/api/apps/v1alpha1"
)

// change is what must be done to a pool's buckets. A created bucket has no
// name yet.
type change struct {
	create, update, remove []v1alpha1.NodeBucket
}

// distribute fits the nodes of a pool into its buckets with few changes:
// nodes that are gone are taken out, new ones fill buckets that change anyway,
// then those with most room, then new ones. A bucket that would be empty is
// reused for a new one before it is removed.
func distribute(nodes []string, buckets []v1alpha1.NodeBucket, most int) change {
	slices.SortFunc(buckets, func(a, b v1alpha1.NodeBucket) int { return cmp.Compare(a.Name, b.Name) })
	missing := map[string]bool{}
	for _, n := range nodes {
		missing[n] = true
	}
	changed := make([]bool, len(buckets))
	kept := make([][]string, len(buckets))
	for i, b := range buckets {
		for _, n := range b.Nodes {
			if missing[n.Name] && len(kept[i]) < most {
				kept[i] = append(kept[i], n.Name)
				delete(missing, n.Name)
				continue
			}
			changed[i] = true // gone, there twice, or too many
		}
		changed[i] = changed[i] || int(b.NumNodes) != len(kept[i])
	}
	rest := slices.Sorted(maps.Keys(missing))
	fill := func(i int) {
		n := min(most-len(kept[i]), len(rest))
		if n > 0 {
			kept[i], rest, changed[i] = append(kept[i], rest[:n]...), rest[n:], true
		}
	}
	for i := range buckets {
		if changed[i] {
			fill(i)
		}
	}
	byRoom := make([]int, len(buckets))
	for i := range byRoom {
		byRoom[i] = i
	}
	slices.SortStableFunc(byRoom, func(a, b int) int { return cmp.Compare(len(kept[a]), len(kept[b])) })
	for _, i := range byRoom {
		fill(i)
	}
	var out change
	for i, b := range buckets {
		switch {
		case len(kept[i]) == 0:
			out.remove = append(out.remove, b)
		case changed[i]:
			out.update = append(out.update, with(b, kept[i]))
		}
	}
	for len(rest) > 0 {
		n := min(most, len(rest))
		out.create = append(out.create, with(v1alpha1.NodeBucket{}, rest[:n]))
		rest = rest[n:]
	}
	return out
}

func with(b v1alpha1.NodeBucket, names []string) v1alpha1.NodeBucket {
	b.Nodes = make([]v1alpha1.Node, len(names))
	for i, name := range slices.Sorted(slices.Values(names)) {
		b.Nodes[i].Name = name
	}
	b.NumNodes = int32(len(names)) //nolint:gosec // a bucket's most
	return b
}
