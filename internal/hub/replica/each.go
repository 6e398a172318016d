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
		if _, err := s.each(namespace, fn); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// EachOf is Each for one scope and no wider one; it reports whether that is
// held.
func (r *Replica) EachOf(scope Scope, fn func(key string, k Kind, data []byte) error) (held bool, err error) {
	r.mu.Lock()
	st, ok := r.streams[scope]
	r.mu.Unlock()
	if !ok {
		return false, nil
	}
	return st.set.each("", fn)
}

func (s *set) each(namespace string, fn func(key string, k Kind, data []byte) error) (held bool, err error) {
	v, err := s.view()
	if errors.Is(err, errNotSynced) {
		return false, nil
	}
	if err == nil {
		err = v.each(matcher{namespace: namespace}, func(key string, _ *entry, data []byte) error { return fn(key, v.kind, data) })
		v.Close()
	}
	if err != nil {
		return false, fmt.Errorf("read %s: %w", s.id, err)
	}
	return true, nil
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
