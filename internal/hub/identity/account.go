package identity

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"strings"
	"time"

	"github.com/yurt-edge/yurt/internal/hub/clock"
)

// accounts remembers the UID of each ServiceAccount as the cloud last stated
// it. A signature proves that a token was issued, not that its account is
// still there: when the account was made anew under the same name, tokens of
// the old one are refused by this.
type accounts struct{ uids table[string] }

var errReplacedAccount = errors.New("the token's service account was deleted and made anew")

func newAccounts(memory Memory, maxAge time.Duration, by *clock.Clock) accounts {
	return accounts{uids: table[string]{memory: memory, prefix: "account", ways: 16, maxAge: maxAge, clock: by}}
}

// note remembers what the cloud said about a caller.
func (a *accounts) note(name, uid string) error {
	if uid == "" || !strings.HasPrefix(name, serviceAccountPrefix) {
		return nil
	}
	set, d := accountSet(name)
	known, at, found, err := a.uids.get(set, d)
	if err != nil || (found && known == uid && a.uids.clock.Since(at) < a.uids.maxAge/8) {
		return err
	}
	return a.uids.put(set, d, &uid)
}

// uid returns the UID of the named account, or "" when it is not known.
func (a *accounts) uid(name string) (string, error) {
	set, d := accountSet(name)
	uid, _, _, err := a.uids.get(set, d)
	return uid, err
}

// check returns an error if the cloud has stated another UID since the token
// of c was issued.
func (a *accounts) check(c *Caller) error {
	uid, err := a.uid(c.Name)
	if err == nil && uid != "" && uid != c.UID {
		err = errReplacedAccount
	}
	return err
}

// accountSet spreads accounts over 64 records.
func accountSet(name string) (string, digest) {
	d := digest(sha256.Sum256([]byte(name)))
	return hex.EncodeToString([]byte{d[0] & 63}), d
}
