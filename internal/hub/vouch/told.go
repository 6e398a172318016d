package vouch

import (
	"maps"
	"slices"
)

// Carrier returns the peer that last took this node's heartbeat to the cloud;
// empty: none does.
func (v *Vouch) Carrier() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.carrier
}

// Carries returns the nodes whose heartbeats this hub carries.
func (v *Vouch) Carries() []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.dropLocked()
	return slices.Sorted(maps.Keys(v.kept))
}
