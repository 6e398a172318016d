package identity

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
)

// court is an Authorizer that can be taken offline.
type court struct {
	*Authorizer
	cloud  *cloud
	memory *MapMemory
	line
}

func newCourt(t testing.TB) *court {
	c := &court{cloud: newCloud(t), memory: &MapMemory{}}
	c.restart()
	return c
}

func (c *court) restart() {
	c.Authorizer = NewAuthorizer(AuthorizerConfig{API: c.cloud, Memory: c.memory, Log: quiet(), Online: c.up, Contact: c.healed})
}

func (c *court) allow(f func(authorizationv1.SubjectAccessReviewSpec) bool) {
	c.cloud.set(func() { c.cloud.allow = f })
}

func always(yes bool) func(authorizationv1.SubjectAccessReviewSpec) bool {
	return func(authorizationv1.SubjectAccessReviewSpec) bool { return yes }
}

func (c *court) want(t testing.TB, who *Caller, a Attributes, allowed bool) Decision {
	t.Helper()
	d, err := c.Authorize(t.Context(), who, a)
	must(t, err)
	if d.Allowed != allowed {
		t.Fatalf("got %+v, want allowed=%t", d, allowed)
	}
	return d
}

func (c *court) asked(t testing.TB, want int) {
	t.Helper()
	synctest.Wait()
	if _, got, _ := c.cloud.counts(); got != want {
		t.Fatalf("%d access reviews, want %d", got, want)
	}
}

func web() *Caller { return &Caller{Name: webUser, Groups: []string{"g", groupAuthenticated}} }

func list(namespace string) Attributes {
	return Attributes{Verb: "list", Version: "v1", Resource: "pods", Namespace: namespace}
}

func selector(t testing.TB, a Attributes, field, label string) Attributes {
	f, err := fields.ParseSelector(field)
	must(t, err)
	l, err := labels.Parse(label)
	must(t, err)
	a.FieldSelector = f.Requirements()
	a.LabelSelector, _ = l.Requirements()
	return a
}

func TestAccessReviewCarriesEverything(t *testing.T) {
	c := newCourt(t)
	var got authorizationv1.SubjectAccessReviewSpec
	c.allow(func(s authorizationv1.SubjectAccessReviewSpec) bool { got = s; return true })
	who := &Caller{Name: "system:node:edge-1", UID: "u", Groups: []string{"system:nodes"}, Extra: map[string][]string{"k": {"v"}}}
	a := selector(t, Attributes{Verb: "watch", Group: "apps", Version: "v1", Resource: "pods", Subresource: "status", Namespace: "n", Name: "x"},
		"spec.nodeName=edge-1,metadata.name!=y", "app in (a,b),!old,new")
	c.want(t, who, a, true)
	r := got.ResourceAttributes
	text := fmt.Sprint(got.User, got.UID, got.Groups, got.Extra, r.Verb, r.Group, r.Version, r.Resource, r.Subresource, r.Namespace, r.Name,
		r.FieldSelector.Requirements, r.LabelSelector.Requirements)
	for _, want := range []string{
		"system:node:edge-1u[system:nodes] map[k:[v]]watchappsv1podsstatusnx", "{spec.nodeName In [edge-1]}", "{metadata.name NotIn [y]}",
		"{app In [a b]}", "{old DoesNotExist []}", "{new Exists []}",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%q lacks %q", text, want)
		}
	}
	c.want(t, who, Attributes{Verb: "get", Path: "/version"}, true)
	if got.ResourceAttributes != nil || got.NonResourceAttributes.Path != "/version" {
		t.Errorf("got %+v", got)
	}
}

func TestDecisionTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCourt(t)
		c.allow(always(true))
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() { c.want(t, web(), list("a"), true) })
		}
		wg.Wait()
		c.asked(t, 1)
		elapse(allowedRefresh + time.Second)
		c.allow(always(false))
		c.want(t, web(), list("a"), true) // the last time; asked again behind
		c.asked(t, 2)
		c.want(t, web(), list("a"), false)
		elapse(deniedTTL - time.Second)
		c.want(t, web(), list("a"), false)
		c.asked(t, 2)
		elapse(2 * time.Second)
		c.allow(always(true))
		c.want(t, web(), list("a"), true)
		c.asked(t, 3)
		elapse(allowedTTL + time.Second)
		c.allow(always(false))
		c.want(t, web(), list("a"), false) // after a pause the cloud is waited for
		c.asked(t, 4)
	})
}

func TestRememberedDecisions(t *testing.T) {
	narrow := selector(t, list("a"), "spec.nodeName=edge-1", "")
	tests := []struct {
		name    string
		asked   Attributes
		allowed bool
		then    Attributes
		want    bool
	}{
		{"the same", list("a"), true, list("a"), true},
		{"denied", list("a"), false, list("a"), false},
		{"never asked", list("a"), true, list("b"), false},
		{"other verb", list("a"), true, Attributes{Verb: "watch", Version: "v1", Resource: "pods", Namespace: "a"}, false},
		{"other version", list("a"), true, Attributes{Verb: "list", Version: "v2", Resource: "pods", Namespace: "a"}, true},
		{"other group", list("a"), true, Attributes{Verb: "list", Group: "x", Resource: "pods", Namespace: "a"}, false},
		{"subresource", list("a"), true, Attributes{Verb: "list", Resource: "pods", Subresource: "log", Namespace: "a"}, false},
		{"all namespaces for one", list(""), true, list("a"), true},
		{"one namespace for all", list("a"), true, list(""), false},
		{"all names for one", Attributes{Verb: "get", Resource: "pods", Namespace: "a"}, true, Attributes{Verb: "get", Resource: "pods", Namespace: "a", Name: "x"}, true},
		{"everything for one", Attributes{Verb: "get", Resource: "pods"}, true, selector(t, Attributes{Verb: "get", Resource: "pods", Namespace: "a", Name: "x"}, "a=b", "c"), true},
		{"one name for all", Attributes{Verb: "get", Resource: "pods", Namespace: "a", Name: "x"}, true, Attributes{Verb: "get", Resource: "pods", Namespace: "a"}, false},
		{"no selector for one", list("a"), true, narrow, true},
		{"a selector for none", narrow, true, list("a"), false},
		{"a selector for another", narrow, true, selector(t, list("a"), "spec.nodeName=edge-2", ""), false},
		{"a label for a field", selector(t, list("a"), "", "x=y"), true, selector(t, list("a"), "x=y", ""), false},
		{"denied all for one", list(""), false, list("a"), false},
		{"path", Attributes{Verb: "get", Path: "/version"}, true, Attributes{Verb: "get", Path: "/version"}, true},
		{"other path", Attributes{Verb: "get", Path: "/version"}, true, Attributes{Verb: "get", Path: "/metrics"}, false},
	}
	for _, tt := range tests {
		for _, restart := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/restart=%t", tt.name, restart), func(t *testing.T) {
				c := newCourt(t)
				c.allow(always(tt.allowed))
				c.want(t, web(), tt.asked, tt.allowed)
				c.offline.Store(true)
				c.cloud.set(func() { c.cloud.cut = true })
				if restart {
					c.restart()
				}
				d := c.want(t, web(), tt.then, tt.want)
				if restart && (!d.Remembered || d.Reason == "") {
					t.Errorf("got %+v", d)
				}
				if c.want(t, &Caller{Name: "other", Groups: web().Groups}, tt.then, false); tt.want {
					scoped := web()
					scoped.Extra = map[string][]string{"scopes": {"user:info"}}
					c.want(t, scoped, tt.then, false)
					c.want(t, &Caller{Name: webUser, Groups: []string{"g"}}, tt.then, false)
					bound := web()
					bound.Extra = map[string][]string{extraPodName: {"web-1"}}
					c.want(t, bound, tt.then, true)
				}
			})
		}
	}
}

func TestLatestAnswerWinsOffline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCourt(t)
		say := func(a Attributes, yes bool) {
			t.Helper()
			elapse(allowedTTL + time.Second)
			c.offline.Store(false)
			c.allow(always(yes))
			c.want(t, web(), a, yes)
			c.offline.Store(true)
			c.restart()
		}
		say(list(""), true)
		say(list("a"), false)
		c.want(t, web(), list("a"), false)
		c.want(t, web(), list("b"), false) // who may not list one may not list all
		say(list(""), true)
		c.want(t, web(), list("b"), true)
		say(list("a"), true)
		c.want(t, web(), list("a"), true)
		say(list("a"), false)
		say(list(""), true)
		c.want(t, web(), list("a"), true)
		say(list(""), false)
		c.want(t, web(), list("b"), false)
		say(list(""), true)
		c.want(t, web(), list("a"), true)
	})
}

func TestFailingReviewsFallBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCourt(t)
		c.allow(always(true))
		c.want(t, web(), list("a"), true)
		c.cloud.set(func() { c.cloud.hang = true })
		elapse(allowedTTL + time.Second)
		wait := func(a Attributes, allowed bool) time.Duration {
			start := time.Now()
			c.want(t, web(), a, allowed)
			return time.Since(start)
		}
		if w := wait(list("a"), true); w != DefaultBudget {
			t.Errorf("waited %s", w)
		}
		for range 60 {
			elapse(time.Second)
			if w := wait(list("a"), true); w != 0 {
				t.Errorf("waited %s again", w)
			}
		}
		if w := wait(list("b"), false); w != DefaultBudget {
			t.Errorf("waited %s", w)
		}
		if w := wait(list("b"), false); w != 0 {
			t.Errorf("waited %s again", w)
		}
		c.cloud.set(func() { c.cloud.hang = false })
		elapse(fallbackTTL + time.Second)
		c.want(t, web(), list("b"), true)

		c.cloud.set(func() { c.cloud.hang = true })
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := c.Authorize(ctx, web(), list("c")); err == nil {
			t.Error("no error after the caller left")
		}
		elapse(DefaultBudget)
		synctest.Wait()
	})
}

func TestDecisionsAreSavedSeldom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCourt(t)
		saves := func(want int) {
			t.Helper()
			synctest.Wait()
			if got := c.memory.Saves(); got != want {
				t.Fatalf("%d saves, want %d", got, want)
			}
		}
		for i := range 1000 {
			c.want(t, web(), list(fmt.Sprint("secret-", i)), false)
		}
		saves(0)
		c.allow(always(true))
		for range 100 {
			elapse(time.Hour)
			c.want(t, web(), list("a"), true)
		}
		saves(1)
		elapse(DefaultMaxAge / 8)
		c.want(t, web(), list("a"), true)
		saves(2)
		c.restart()
		c.offline.Store(true)
		elapse(DefaultMaxAge - time.Hour)
		c.want(t, web(), list("a"), true)
		elapse(2 * time.Hour)
		c.want(t, web(), list("a"), false)
	})
}

func TestRememberedDecisionsAreBounded(t *testing.T) {
	c := newCourt(t)
	c.allow(always(true))
	other := &Caller{Name: "system:node:edge-1"}
	c.want(t, other, list("mine"), true)
	for i := range 3000 {
		c.want(t, web(), list(fmt.Sprint(i)), true)
	}
	if n := len(c.memory.Keys()); n > 65 {
		t.Errorf("%d records for two users", n)
	}
	c.restart()
	c.offline.Store(true)
	c.want(t, other, list("mine"), true)
	kept := 0
	for i := range 3000 {
		if d, _ := c.Authorize(t.Context(), web(), list(fmt.Sprint(i))); d.Allowed {
			kept++
		}
	}
	if kept < 900 || kept > 1024 {
		t.Errorf("%d decisions kept", kept)
	}
}

func TestMastersNeedNoReview(t *testing.T) {
	c := newCourt(t)
	c.offline.Store(true)
	c.want(t, &Caller{Name: "admin", Groups: []string{groupMasters}}, list(""), true)
}
