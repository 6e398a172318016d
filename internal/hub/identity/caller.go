package identity

import (
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"

	authenticationv1 "k8s.io/api/authentication/v1"
)

// Groups and keys of "extra" that Kubernetes gives to authenticated users.
const (
	groupAuthenticated   = "system:authenticated"
	groupMasters         = "system:masters"
	groupServiceAccounts = "system:serviceaccounts"
	serviceAccountPrefix = "system:serviceaccount:"

	extraPrefix       = "authentication.kubernetes.io/"
	extraCredentialID = extraPrefix + "credential-id"
	extraPodName      = extraPrefix + "pod-name"
	extraPodUID       = extraPrefix + "pod-uid"
	extraNodeName     = extraPrefix + "node-name"
	extraNodeUID      = extraPrefix + "node-uid"
)

// Caller is who sent a request. Groups and Extra are shared between requests
// and must not be changed.
type Caller struct {
	Name   string
	UID    string
	Groups []string
	Extra  map[string][]string

	// Certificate says that the caller proved itself by a client certificate,
	// not by a token.
	Certificate bool
	// Token is the bearer token as presented, empty with Certificate. It is a
	// secret: neither String nor LogValue shows it.
	Token string
	// Local says that Token was signed by this hub. Only this hub accepts it:
	// it is useless upstream.
	Local bool
	// Remembered says that the cloud could not be asked about Token just now.
	Remembered bool

	user *digest // of userDigest, for callers that are cached; nil: not yet
}

// remember computes once what every question about the caller needs. The
// caller must not be shared yet, nor change later.
func (c *Caller) remember() {
	d := userDigest(c)
	c.user = &d
}

// String names the caller and its groups, without any secret.
func (c Caller) String() string {
	return fmt.Sprintf("%s [%s]", c.Name, strings.Join(c.Groups, " "))
}

// GoString is String, so that %#v does not show the token either.
func (c Caller) GoString() string { return c.String() }

// LogValue makes the caller safe to log.
func (c Caller) LogValue() slog.Value { return slog.StringValue(c.String()) }

// withToken returns a copy that carries the token, which caches do not hold.
func (c *Caller) withToken(token string) *Caller {
	out := *c
	out.Token = token
	return &out
}

func callerFromUserInfo(u authenticationv1.UserInfo) *Caller {
	c := &Caller{Name: u.Username, UID: u.UID, Groups: slices.Clone(u.Groups)}
	if len(u.Extra) > 0 {
		c.Extra = make(map[string][]string, len(u.Extra))
		for k, v := range u.Extra {
			c.Extra[k] = v
		}
	}
	if !slices.Contains(c.Groups, groupAuthenticated) {
		c.Groups = append(c.Groups, groupAuthenticated)
	}
	return c
}

// sameUser tells whether two callers, or two nils, are alike to authorizers.
func sameUser(a, b *Caller) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Name == b.Name && a.UID == b.UID && slices.Equal(a.Groups, b.Groups) &&
		maps.EqualFunc(a.Extra, b.Extra, slices.Equal)
}
