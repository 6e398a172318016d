package store

import (
	"errors"
	"fmt"
)

// Limits of the file format.
const (
	maxName = 16 << 10 // of a bucket or a key
	// opCost is what an operation is taken to cost beside its data when
	// the size of a batch is estimated.
	opCost = 64
)

// Record is a stored object.
type Record struct {
	Version  uint64 // resource version or any counter of the caller
	Encoding uint8  // the caller's name for the form of Data
	Data     []byte
}

// Header is what is known of a record without opening it.
type Header struct {
	Version  uint64
	Encoding uint8
	Size     int // of Record.Data
}

type opKind uint8

const (
	opPut opKind = iota
	opDelete
	opDrop
)

type op struct {
	kind        opKind
	bucket, key string
	rec         Record
	value       []byte // sealed form of rec
}

// Batch is a list of changes that become durable together or not at all,
// in their order. The zero value is an empty batch. A batch may be changed
// until it is handed to Commit or Submit, and again after that has ended.
// It is for one goroutine.
type Batch struct {
	ops  []op
	size int
	err  error // of the first change that cannot be stored
}

// NewBatch returns an empty batch.
func NewBatch() *Batch { return new(Batch) }

// Put stores r at key. It keeps r.Data, which must not change until the
// batch is handed over. A bucket or key that is empty or longer than 16 KiB
// and data above 64 MiB fail the whole batch when it is handed over.
func (b *Batch) Put(bucket, key string, r Record) {
	if len(r.Data) > maxData {
		b.fail(fmt.Errorf("put %q in %q: %d bytes of data, limit %d", key, bucket, len(r.Data), maxData))
	}
	b.checkKey(key)
	b.add(op{kind: opPut, bucket: bucket, key: key, rec: r})
}

// Delete removes key. It is no error if there is none.
func (b *Batch) Delete(bucket, key string) {
	b.checkKey(key)
	b.add(op{kind: opDelete, bucket: bucket, key: key})
}

// Drop removes a whole bucket. It is no error if there is none. A Drop
// followed by Puts in the same batch replaces a bucket at once.
func (b *Batch) Drop(bucket string) {
	b.add(op{kind: opDrop, bucket: bucket})
}

// Len returns the number of changes.
func (b *Batch) Len() int { return len(b.ops) }

// Size returns about how many bytes the batch takes, before compression.
func (b *Batch) Size() int { return b.size }

func (b *Batch) add(o op) {
	if o.bucket == "" || len(o.bucket) > maxName {
		b.fail(fmt.Errorf("bucket name of %d bytes, must be 1 to %d", len(o.bucket), maxName))
	}
	b.ops = append(b.ops, o)
	b.size += len(o.bucket) + len(o.key) + len(o.rec.Data) + opCost
}

func (b *Batch) checkKey(key string) {
	if key == "" || len(key) > maxName {
		b.fail(fmt.Errorf("key of %d bytes, must be 1 to %d", len(key), maxName))
	}
}

func (b *Batch) fail(err error) {
	if b.err == nil {
		b.err = errors.Join(ErrInvalid, err)
	}
}

// seal makes the stored form of every record that has none yet, in one
// buffer. It runs on the caller's goroutine to keep the committer free.
func (b *Batch) seal(c *codec) {
	size := 0
	for _, o := range b.ops {
		size += len(o.rec.Data) + headerSize + tagSize
	}
	arena := make([]byte, 0, size)
	for i := range b.ops {
		o := &b.ops[i]
		if o.kind != opPut || o.value != nil {
			continue
		}
		at := len(arena)
		arena = c.seal(arena, o.bucket, o.key, o.rec)
		o.value = arena[at:len(arena):len(arena)]
	}
}
