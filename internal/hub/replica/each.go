package replica

import (
	"errors"
	"fmt"

	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Each calls fn for every object of a resource that the replica holds, as
// local readers see it, in one namespace or, if it is empty, in all. An object
// that several scopes hold comes several times. The data is valid until fn
// returns, whose error ends the scope; the others are still read.
func (r *Replica) Each(resource schema.GroupVersionResource, namespace string, fn func(key string, k Kind, data []byte) error) error {
	var errs []error
	for _, st := range r.all() {
		s := st.set
		if s.scope.Resource != resource || (namespace != "" && s.scope.Namespace != "" && s.scope.Namespace != namespace) {
			continue
		}
		v, err := s.view()
		if errors.Is(err, errNotSynced) {
			continue
		}
		if err == nil {
			err = v.each(matcher{namespace: namespace}, func(key string, _ *entry, data []byte) error { return fn(key, v.kind, data) })
			v.Close()
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("read %s: %w", s.id, err))
		}
	}
	return errors.Join(errs...)
}

// Unpin lets a scope go that Pin held: it stays while somebody uses it.
func (r *Replica) Unpin(scope Scope) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if st, ok := r.streams[scope]; ok {
		st.pinned = false
	}
}

// Changed returns a channel that is closed when the slice's scope changes.
func (sl *Slice) Changed() <-chan struct{} {
	s := sl.stream.set
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}
