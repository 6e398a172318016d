package identity

import (
	"context"
	"encoding/json"
	"testing"
)

// words is a Memory that holds the same everywhere, and takes nothing.
type words []byte

func (w words) Load(string) ([]byte, error) { return w, nil }

func (words) Save(string, []byte) error { return nil }

func (words) Delete(string) error { return nil }

// FuzzMemory begins, cut off, with whatever may stand where identities and
// decisions are remembered: it makes nobody known and allows nothing.
func FuzzMemory(f *testing.F) {
	token := newCloud(f).token(f, nil)
	jwks, issuer, err := newCloud(f).Keys(context.Background()) // of another cluster
	must(f, err)
	keys, err := json.Marshal(&trust{JWKS: jwks, Issuer: issuer, Audiences: []string{testAudience}})
	must(f, err)
	f.Add(keys)
	f.Add(keys[:len(keys)/2])
	f.Add([]byte(`[{"h":"AAAA","t":9223372036854775807,"v":true}]`))
	f.Add([]byte(`[{"h":null,"t":-1,"v":{"name":"admin","groups":["system:masters"]}},null]`))
	f.Add([]byte(`{"jwks":{"keys":[{"kty":"oct","k":"AA"}]}}`))
	self := &Caller{Name: "system:node:edge-1", Groups: []string{"system:nodes", groupAuthenticated}}
	offline := func() bool { return false }
	f.Fuzz(func(t *testing.T, text []byte) {
		a := NewAuthenticator(AuthenticatorConfig{API: newCloud(t), Memory: words(text), Online: offline, Log: quiet()})
		if c, err := a.Authenticate(withToken(token)); err == nil {
			t.Errorf("a token of another cluster is %v", c)
		}
		_ = a.AccountUID("shop", "web")
		z := NewAuthorizer(AuthorizerConfig{API: newCloud(t), Memory: words(text), Online: offline, Self: self, Log: quiet()})
		for _, c := range []*Caller{self, web()} {
			if d, err := z.Authorize(t.Context(), c, list("shop")); err != nil || d.Allowed {
				t.Errorf("%s: %+v, %v", c.Name, d, err)
			}
		}
		if s, err := NewLocalSigner("edge-1", words(text), nil); err == nil && s == nil {
			t.Error("no signer and no error")
		}
	})
}
