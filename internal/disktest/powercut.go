package disktest

import (
	"bytes"
	"fmt"
	"hash/maphash"
	"maps"
	"math/rand/v2"
	"slices"
)

const (
	sector = 512
	page   = 4096

	// allSubsets is up to how many unsynced operations every subset of them
	// is tried; beyond it, as many random ones.
	allSubsets = 5
)

// Image is a state in which a power cut may leave the disk. It is valid until
// the function that was given it returns.
type Image struct {
	Files map[string][]byte // by name
	Marks []string          // what was marked before the cut
	How   string            // what was kept of the unsynced operations
}

// PowerCuts calls check with the states that a power cut at any moment of the
// log may leave, each different state once per moment of sync.
//
// What was synced is there. Of what was not, every operation may be there,
// be missing, or be there in part: any of its 512-byte sectors or 4 KiB
// pages, whatever came of the operations before it. A sector that was being
// changed may hold noise. Names change in their order, and independently of
// the bytes in files. After a failed sync the bytes that it should have
// written stay in doubt, also when a later sync succeeds: the kernel has
// marked them as written.
//
// The states are all prefixes of the unsynced operations, all subsets where
// there are few and random ones where there are many, each last operation
// torn, and random sets of sectors and pages; chosen by rng where chosen.
func (l Log) PowerCuts(rng *rand.Rand, check func(Image)) (count int) {
	m := model{
		rng: rng, files: map[int]*content{}, names: map[string]int{}, seed: maphash.MakeSeed(),
		check: func(i Image) { count++; check(i) },
	}
	for i := range l {
		op := &l[i]
		// Just before something becomes durable everything before it may
		// be there or not. That covers all earlier moments too.
		switch op.Kind {
		case Sync, SyncDir:
			m.cuts()
		}
		m.apply(op)
	}
	m.cuts()
	return count
}

// content is one file.
type content struct {
	durable []byte
	pending []pending
	buf     []byte // of images
}

// pending is an operation that is not folded into the durable content.
type pending struct {
	op *Op
	// doubtful operations were part of a sync that failed. A synced one that
	// follows them stays in the list, to be put over them.
	doubtful, synced bool
}

type model struct {
	rng     *rand.Rand
	seed    maphash.Seed
	files   map[int]*content
	names   map[string]int // durable
	renames []*Op          // not durable yet
	marks   []string
	check   func(Image)
	seen    map[uint64]bool // states since the last sync
}

func (m *model) apply(op *Op) {
	switch op.Kind {
	case Mark:
		m.marks = append(m.marks, op.Name)
	case Create:
		m.files[op.File] = &content{}
		m.renames = append(m.renames, op)
	case Rename, Remove:
		m.renames = append(m.renames, op)
	case Write, Truncate:
		c := m.files[op.File]
		c.pending = append(c.pending, pending{op: op})
	case Sync:
		m.files[op.File].sync(op.Failed)
	case SyncDir:
		if !op.Failed { // a failed one may be tried again: names are kept in a journal
			m.names = m.renamed(len(m.renames))
			m.renames = nil
		}
	}
}

func (c *content) sync(failed bool) {
	for i := range c.pending {
		p := &c.pending[i]
		switch {
		case failed && !p.synced:
			p.doubtful = true
		case !p.doubtful:
			p.synced = true
		}
	}
	for len(c.pending) > 0 && c.pending[0].synced {
		c.durable = c.pending[0].op.apply(c.durable)
		c.pending = c.pending[1:]
	}
}

// renamed returns the names after the first n changes of them.
func (m *model) renamed(n int) map[string]int {
	names := maps.Clone(m.names)
	for _, op := range m.renames[:n] {
		switch op.Kind {
		case Create:
			names[op.Name] = op.File
		case Remove:
			delete(names, op.Name)
		case Rename:
			names[op.To] = names[op.Name]
			delete(names, op.Name)
		}
	}
	return names
}

// cuts checks all states that a cut at this moment may leave.
func (m *model) cuts() {
	m.seen = map[uint64]bool{}
	var free []*Op
	for _, number := range slices.Sorted(maps.Keys(m.files)) {
		for _, p := range m.files[number].pending {
			if !p.synced {
				free = append(free, p.op)
			}
		}
	}
	for n := range len(m.renames) + 1 {
		m.contents(free, m.renamed(n))
	}
}

// kept says which sectors of an operation are there: nil is none of it.
type kept func(at int64) fate

type fate uint8

const (
	missing fate = iota
	there
	noise
)

func whole(int64) fate { return there }

// contents checks all states of the bytes with these names.
func (m *model) contents(free []*Op, names map[string]int) {
	try := func(how string, keep map[*Op]kept) { m.image(how, names, keep) }
	prefix := map[*Op]kept{}
	try("nothing", prefix)
	for i, op := range free {
		if op.Kind == Write {
			for _, torn := range m.tears(op) {
				keep := maps.Clone(prefix)
				keep[op] = torn
				try(fmt.Sprintf("%d whole and one torn", i), keep)
			}
		}
		prefix[op] = whole
		try(fmt.Sprintf("the first %d", i+1), prefix)
	}
	if len(free) < 2 {
		return
	}
	subsets := 1 << min(len(free), allSubsets)
	for set := range subsets {
		keep := map[*Op]kept{}
		for i, op := range free {
			if len(free) <= allSubsets && set&(1<<i) != 0 || len(free) > allSubsets && m.rng.IntN(2) == 0 {
				keep[op] = whole
			}
		}
		try("some", keep)
	}
	for round := range subsets {
		keep := map[*Op]kept{}
		for _, op := range free {
			keep[op] = m.some([]int64{sector, page}[round%2], round%4 > 1)
		}
		try("parts of each", keep)
	}
}

// tears returns ways in which one write may be cut short.
func (m *model) tears(op *Op) []kept {
	first, last := op.Offset/sector, (op.Offset+int64(len(op.Data))-1)/sector
	cut := (first + min(1, last-first)) * sector // the second sector
	if last > first {
		cut += m.rng.Int64N(last-first) * sector
	}
	return []kept{
		func(at int64) fate { return pick(at < cut, there, missing) },
		func(at int64) fate { return pick(at >= cut, there, missing) },
		func(at int64) fate { return pick(at/page*page <= cut, there, missing) },
		func(at int64) fate { return pick(at == cut, noise, there) },
		func(at int64) fate { return pick(at == first*sector, noise, missing) },
		m.some(sector, false),
		m.some(sector, true),
	}
}

// some keeps random units of an operation.
func (m *model) some(unit int64, noisy bool) kept {
	seed := m.rng.Uint64()
	return func(at int64) fate {
		u := uint64(at / unit)
		switch n := rand.New(rand.NewPCG(seed, u)).IntN(8); {
		case noisy && n == 0:
			return noise
		case n < 4:
			return missing
		}
		return there
	}
}

func pick(yes bool, a, b fate) fate {
	if yes {
		return a
	}
	return b
}

// image builds one state and checks it.
func (m *model) image(how string, names map[string]int, keep map[*Op]kept) {
	files := map[string][]byte{}
	var h maphash.Hash
	h.SetSeed(m.seed)
	for _, name := range slices.Sorted(maps.Keys(names)) {
		c := m.files[names[name]]
		data := append(c.buf[:0], c.durable...)
		for _, p := range c.pending {
			if p.synced {
				data = p.op.apply(data)
			} else if k := keep[p.op]; k != nil {
				data = m.part(data, p.op, k)
			}
		}
		files[name], c.buf = data, data
		// Images of one moment differ only where something is pending.
		fmt.Fprintf(&h, "%q %d %d ", name, names[name], len(data))
		for _, p := range c.pending {
			from, to := p.op.Offset, p.op.Offset+int64(len(p.op.Data))
			_, _ = h.Write(data[min(from, int64(len(data))):min(to, int64(len(data)))])
		}
	}
	if m.seen[h.Sum64()] {
		return
	}
	m.seen[h.Sum64()] = true
	m.check(Image{Files: files, Marks: slices.Clone(m.marks), How: how})
}

// part applies what is kept of an operation.
func (m *model) part(data []byte, op *Op, keep kept) []byte {
	if op.Kind == Truncate {
		if keep(0) == missing {
			return data
		}
		return op.apply(data)
	}
	for at := op.Offset / sector * sector; at < op.Offset+int64(len(op.Data)); at += sector {
		from, to := max(at, op.Offset), min(at+sector, op.Offset+int64(len(op.Data)))
		piece := Op{Kind: Write, Offset: from, Data: op.Data[from-op.Offset : to-op.Offset]}
		switch keep(at) {
		case missing:
			continue
		case noise:
			if int(to) <= len(data) && bytes.Equal(data[from:to], piece.Data) {
				continue // the same bytes written again do no harm
			}
			piece.Data = make([]byte, to-from)
			for i := range piece.Data {
				piece.Data[i] = byte(m.rng.Uint32())
			}
		}
		data = piece.apply(data)
	}
	return data
}
