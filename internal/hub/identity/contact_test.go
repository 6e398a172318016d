package identity

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
)

// TestRevokedDuringCut is about the first question after a cut: it is the
// cloud that answers it, whatever was known before.
func TestRevokedDuringCut(t *testing.T) {
	t.Run("right", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := newCourt(t)
			c.allow(always(true))
			c.want(t, web(), list(""), true)
			c.want(t, web(), list("a"), true) // by the wider one
			c.offline.Store(true)
			c.want(t, web(), list("b"), true)
			c.allow(always(false))
			c.heal()
			for _, namespace := range []string{"a", "b", ""} {
				c.want(t, web(), list(namespace), false)
			}
			c.restart()
			c.offline.Store(true)
			for _, namespace := range []string{"a", "b", "c", ""} {
				c.want(t, web(), list(namespace), false)
			}
		})
	})
	t.Run("token", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := newBed(t)
			must(t, b.refreshKeys(t.Context()))
			token := b.cloud.token(t, nil)
			r := withToken(b.cloud.admit(token, webUser))
			if c := b.want(t, r, webUser); c.Remembered {
				t.Error("the cloud's answer counts as remembered")
			}
			b.offline.Store(true)
			b.want(t, r, webUser)
			b.cloud.set(func() { delete(b.cloud.users, token) })
			b.heal()
			b.want(t, r, "")
			b.offline.Store(true)
			b.restart()
			b.want(t, r, "")
		})
	})
	t.Run("granted", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c, b := newCourt(t), newBed(t)
			c.offline.Store(true)
			b.offline.Store(true)
			c.want(t, web(), list("a"), false)
			r := withToken(b.cloud.admit("opaque", webUser))
			b.want(t, r, "")
			c.allow(always(true))
			c.heal()
			b.heal()
			c.want(t, web(), list("a"), true) // no refusal of the outage lingers
			b.want(t, r, webUser)
		})
	})
}

// TestFlightFromBeforeContact is about a question that was on its way when the
// link came back: its answer is the old one.
func TestFlightFromBeforeContact(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCourt(t)
		c.allow(always(true))
		c.want(t, web(), list("a"), true)
		elapse(allowedTTL + time.Second)
		c.cloud.set(func() { c.cloud.hang = true })
		var early sync.WaitGroup
		early.Go(func() { _, _ = c.Authorize(t.Context(), web(), list("a")) })
		synctest.Wait()
		c.heal()
		c.allow(always(false))
		done := make(chan struct{})
		go func() {
			defer close(done)
			c.want(t, web(), list("a"), false)
		}()
		synctest.Wait()
		c.cloud.set(func() { c.cloud.hang = false })
		<-done
		early.Wait()
	})
}

// TestWeakLink is about reviews that fail while the link is up: what the cloud
// last said counts, and is marked as remembered.
func TestWeakLink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		must(t, b.refreshKeys(t.Context()))
		r := withToken(b.cloud.admit(b.cloud.token(t, nil), webUser))
		b.want(t, r, webUser)
		b.heal()
		b.cloud.set(func() { b.cloud.cut = true })
		if c := b.want(t, r, webUser); !c.Remembered {
			t.Error("the hub's own answer counts as the cloud's")
		}
		b.cloud.set(func() { b.cloud.cut = false })
		elapse(fallbackTTL + time.Second)
		b.want(t, r, webUser) // asks behind
		synctest.Wait()
		if c := b.want(t, r, webUser); c.Remembered {
			t.Error("the cloud's answer counts as remembered")
		}
	})
}

// TestDoubt is about a token that the API server refuses on the way.
func TestDoubt(t *testing.T) {
	b := newBed(t)
	r := withToken(b.cloud.admit("opaque", webUser))
	b.want(t, r, webUser)
	b.cloud.set(func() { clear(b.cloud.users) })
	b.want(t, r, webUser) // nobody asked
	b.Doubt("opaque")
	b.want(t, r, "")
}

// TestRemadeAccount is about a ServiceAccount that was deleted and made anew
// under its old name: the new one inherits nothing, and the old one's tokens
// are refused as soon as the hub has heard of the new one.
func TestRemadeAccount(t *testing.T) {
	b := newBed(t)
	must(t, b.refreshKeys(t.Context()))
	of := func(uid string) string {
		return b.cloud.token(t, func(c *claims) { c.Kubernetes.ServiceAccount.UID = uid })
	}
	user := func(uid string) authenticationv1.UserInfo {
		return authenticationv1.UserInfo{Username: webUser, UID: uid, Groups: []string{groupServiceAccounts, groupServiceAccounts + ":shop", groupAuthenticated}}
	}
	first, second := of("1"), of("2")
	b.cloud.set(func() { b.cloud.users[first], b.cloud.users[second] = user("1"), user("2") })
	before := b.want(t, withToken(first), webUser)
	after := b.want(t, withToken(second), webUser)
	local := func(uid string) *http.Request {
		token, _, err := b.local.Sign(TokenSpec{Namespace: "shop", ServiceAccount: "web", ServiceAccountUID: uid, PodName: "web-0", Life: time.Hour})
		must(t, err)
		return withToken(token)
	}
	b.want(t, local("1"), "")
	b.want(t, local(b.AccountUID("shop", "web")), webUser)
	b.restart()
	b.offline.Store(true)
	b.want(t, withToken(first), "")
	b.want(t, withToken(second), webUser)

	// A token that the hub relays tells of the account as well.
	must(t, b.Learn(of("3"), false))
	b.restart()
	b.want(t, withToken(second), "")
	if uid := b.AccountUID("shop", "web"); uid != "3" {
		t.Errorf("the account's UID is %q", uid)
	}

	c := newCourt(t)
	c.allow(always(true))
	c.want(t, before, list("a"), true)
	c.offline.Store(true)
	c.want(t, before, list("a"), true)
	d := c.want(t, after, list("a"), false)
	if !strings.Contains(d.Reason, "was not asked this") || !strings.Contains(d.Reason, "90 days") || !strings.Contains(d.Reason, "once while the link is up") {
		t.Errorf("the refusal does not help: %q", d.Reason)
	}
}

// TestDecisionsAreOfOneIdentity changes one thing about a caller at a time.
func TestDecisionsAreOfOneIdentity(t *testing.T) {
	caller := func(change func(*Caller)) *Caller {
		c := &Caller{
			Name: webUser, UID: "u", Groups: []string{"g", groupAuthenticated},
			Extra: map[string][]string{"scopes": {"all"}, extraNodeName: {"edge-1"}, extraCredentialID: {"JTI=1"}, extraPodName: {"web-0"}},
		}
		if change != nil {
			change(c)
		}
		return c
	}
	c := newCourt(t)
	c.allow(always(true))
	c.want(t, caller(nil), list("a"), true)
	c.offline.Store(true)
	c.want(t, caller(nil), list("a"), true)
	c.want(t, caller(func(c *Caller) {
		c.Extra[extraCredentialID], c.Extra[extraPodName] = []string{"JTI=2"}, []string{"web-1"}
	}), list("a"), true)
	for what, change := range map[string]func(*Caller){
		"another name":       func(c *Caller) { c.Name += "x" },
		"another UID":        func(c *Caller) { c.UID = "v" },
		"no UID":             func(c *Caller) { c.UID = "" },
		"one more group":     func(c *Caller) { c.Groups = append(c.Groups, "h") },
		"one group less":     func(c *Caller) { c.Groups = c.Groups[1:] },
		"other extra":        func(c *Caller) { c.Extra["scopes"] = []string{"some"} },
		"no extra":           func(c *Caller) { delete(c.Extra, "scopes") },
		"token of elsewhere": func(c *Caller) { c.Extra[extraNodeName] = []string{"edge-2"} },
	} {
		t.Run(what, func(t *testing.T) { c.want(t, caller(change), list("a"), false) })
	}
	for what, a := range map[string]Attributes{
		"another verb":        {Verb: "watch", Version: "v1", Resource: "pods", Namespace: "a"},
		"another resource":    {Verb: "list", Version: "v1", Resource: "secrets", Namespace: "a"},
		"another group":       {Verb: "list", Group: "apps", Version: "v1", Resource: "pods", Namespace: "a"},
		"a subresource":       {Verb: "list", Version: "v1", Resource: "pods", Subresource: "log", Namespace: "a"},
		"another namespace":   {Verb: "list", Version: "v1", Resource: "pods", Namespace: "b"},
		"all namespaces":      {Verb: "list", Version: "v1", Resource: "pods"},
		"a path by that name": {Verb: "list", Path: "/pods"},
	} {
		t.Run(what, func(t *testing.T) { c.want(t, caller(nil), a, false) })
	}
	// What was allowed with a selector is not allowed without.
	c.offline.Store(false)
	c.allow(func(s authorizationv1.SubjectAccessReviewSpec) bool { return s.ResourceAttributes.FieldSelector != nil })
	c.want(t, caller(nil), selector(t, list("n"), "spec.nodeName=edge-1", ""), true)
	c.offline.Store(true)
	c.want(t, caller(nil), selector(t, list("n"), "spec.nodeName=edge-1", "app=web"), false)
	c.want(t, caller(nil), selector(t, list("n"), "spec.nodeName=edge-2", ""), false)
	c.want(t, caller(nil), list("n"), false)
}

// FuzzCredentials sends whatever headers a client may send. None of them makes
// it somebody: there is no token that anybody vouches for.
func FuzzCredentials(f *testing.F) {
	b := newBed(f)
	must(f, b.refreshKeys(f.Context()))
	b.offline.Store(true)
	good := b.cloud.token(f, nil)
	b.learnAudiences([]string{testAudience})
	f.Add("Authorization", "Bearer "+good[:len(good)-4]+"AAAA", "Upgrade", "websocket")
	f.Fuzz(func(t *testing.T, name, value, name2, value2 string) {
		if len(value)+len(value2) > 2*maxToken {
			return
		}
		r := httptest.NewRequest(http.MethodGet, "/api/v1/pods", http.NoBody)
		r.Header.Add(name, value)
		r.Header.Add(name2, value2)
		token := bearer(r)
		if token != "" && !strings.Contains(value+value2, token) && r.Header.Get(protocolHeader) == "" {
			t.Errorf("token %q is in no header", token)
		}
		c, err := b.Authenticate(r)
		if (c == nil) == (err == nil) {
			t.Fatalf("got %v and %v", c, err)
		}
		if err != nil {
			if token != "" && len(token) > 20 && strings.Contains(err.Error(), token) {
				t.Errorf("the refusal shows the token: %v", err)
			}
			return
		}
		if token != good || c.Name != webUser || c.Token != token {
			t.Errorf("%q: %q is %v", r.Header, token, c)
		}
	})
}
