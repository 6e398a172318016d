package v1beta2

import (
	"regexp"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// always are the resources that every pool shares.
var always = []metav1.GroupVersionResource{
	{Version: "v1", Resource: "services"}, {Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices"},
}

// never are resources of the core group that are for one node each.
var never = []string{"secrets", "pods", "nodes"}

var (
	groupName    = regexp.MustCompile(`^[a-z0-9.-]*$`)
	resourceName = regexp.MustCompile(`^[a-z0-9-]+$`)
)

// Shared returns the resources that the pool fetches once, each of them once:
// those that every pool shares and those of PoolScopeMetadata. What may not be
// shared is left out, for what was written by an older version of the type has
// not been judged by the rules of this one: rights are granted by it.
func (p *NodePool) Shared() []metav1.GroupVersionResource {
	out := slices.Clone(always)
	for _, r := range p.Spec.PoolScopeMetadata {
		ok := groupName.MatchString(r.Group) && resourceName.MatchString(r.Resource) && r.Version != "" &&
			(r.Group != "" || !slices.Contains(never, r.Resource))
		if ok && !slices.Contains(out, r) {
			out = append(out, r)
		}
	}
	return out
}
