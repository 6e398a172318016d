package filter

import (
	"bytes"
	"errors"
	"sync/atomic"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/internal/accessfilter"
	"github.com/yurt-edge/yurt/internal/hub/replica"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// Program is an AccessFilter that this node applies. What it cannot be applied
// to is shown as the filters before it left it.
type Program struct {
	*accessfilter.Filter

	// OnFailure is called for each object that it cannot be applied to; nil:
	// nobody.
	OnFailure func()
	failure   atomic.Pointer[string]
}

// Failure says why the program left an object as it was, the last time that it
// did; empty: it never did. It holds nothing of the object.
func (p *Program) Failure() string {
	if s := p.failure.Load(); s != nil {
		return *s
	}
	return ""
}

func (p *Program) fail(err error) {
	why := "an object cannot be read"
	if failed, ok := errors.AsType[*accessfilter.RunError](err); ok {
		why = failed.Brief()
	}
	if old := p.failure.Load(); old == nil || *old != why {
		p.failure.Store(&why)
	}
	if p.OnFailure != nil {
		p.OnFailure()
	}
}

// programs are those of one component, and where it is.
type programs struct {
	scene *accessfilter.Scene
	of    map[schema.GroupVersionResource][]*Program
}

// show shows an object to the programs for its resource, in order.
func (ps *programs) show(resource schema.GroupVersionResource, k replica.Kind, object []byte) ([]byte, bool) {
	var seen accessfilter.Members // of object, once it was asked for
	for _, p := range ps.of[resource] {
		var err error
		if seen == nil {
			if seen, err = view(k, object); err != nil {
				p.fail(err)
				continue
			}
		}
		verdict, err := p.Run(ps.scene, seen)
		switch {
		case err != nil:
			p.fail(err)
			continue
		case verdict.Dropped != nil:
			return nil, false
		case len(verdict.Edits) == 0:
			continue
		}
		edited, err := editAll(k, object, seen, verdict)
		if err != nil {
			p.fail(err)
			continue
		}
		if !bytes.Equal(edited, object) {
			object, seen = edited, nil
		}
	}
	return object, true
}

// view reads an object as far as it is asked for.
func view(k replica.Kind, object []byte) (accessfilter.Members, error) {
	if k.Encoding == wire.Protobuf {
		return wire.NewView(k.APIVersion, k.Kind, object)
	}
	return accessfilter.ParseJSON(object)
}

func editAll(k replica.Kind, object []byte, seen accessfilter.Members, v accessfilter.Verdict) ([]byte, error) {
	if k.Encoding != wire.Protobuf {
		return accessfilter.EditJSON(seen, v)
	}
	for _, e := range v.Edits {
		var err error
		if object, err = wire.Edit(k.APIVersion, k.Kind, object, e.Path, e.Value); err != nil {
			return nil, e.Fail(err)
		}
	}
	return object, nil
}
