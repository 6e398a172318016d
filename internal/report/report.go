// Package report is what a hub says of itself on GET /v1/status, to an
// operator on its node. The hub writes it, yurtadm reads it; a field that one
// of the two does not know is left out or ignored.
package report

import "time"

// Where an operator finds a hub that was installed as the guide tells.
const (
	DefaultRootDir = "/var/lib/yurthub"
	DefaultRunDir  = "/run/yurthub"
	// SocketName is the file below the run directory on which the hub answers
	// root, and nobody else.
	SocketName = "hub.sock"
	StatusPath = "/v1/status"
)

// Report is the state of a hub.
type Report struct {
	Node    string    `json:"node"`
	Pool    string    `json:"pool,omitempty"`
	Version string    `json:"version"`
	Started time.Time `json:"started"`

	// Online tells of the link since when, and Reason why.
	Online bool      `json:"online"`
	Since  time.Time `json:"since"`
	Reason string    `json:"reason,omitempty"`
	// Cut is the last time that the link was cut, if this hub saw one.
	Cut *Cut `json:"cut,omitempty"`

	// Sharing is the hub's part in its pool; nil: it has none.
	Sharing *Sharing `json:"sharing,omitempty"`

	// StatusPending and EventsPending are the writes that wait for the cloud.
	StatusPending int `json:"statusPending"`
	EventsPending int `json:"eventsPending"`
	// Journal tells more of them.
	Journal Journal `json:"journal"`

	StoreBytes   int64  `json:"storeBytes"`
	StoreHealth  string `json:"storeHealth"` // ok, or why not
	StoreDamaged int64  `json:"storeDamaged"`
	StoreRebuilt bool   `json:"storeRebuilt"`

	// KeySource is where the key that seals the store comes from, KeyProblem
	// why this run's key is in memory only.
	KeySource  string `json:"keySource"`
	KeyProblem string `json:"keyProblem,omitempty"`

	// Discovery says that kubectl can work without the cloud.
	Discovery bool `json:"discovery"`

	Clock        Clock         `json:"clock"`
	Certificates []Certificate `json:"certificates"`
	Conditions   []Condition   `json:"conditions"`
	Scopes       []Scope       `json:"scopes"`

	// Endings are pods that end one after the other, the next first: the cloud
	// ended them while this node was away.
	Endings []Ending `json:"endings,omitempty"`
	// Vouching is who speaks for whom without a link; nil: nobody.
	Vouching *Vouching `json:"vouching,omitempty"`
}

// Sharing is how a hub comes by what its pool shares.
type Sharing struct {
	// Role is leader or member.
	Role string `json:"role"`
	// Upstream is cloud, or the node whose hub is followed. Live says that
	// what comes from there follows the cloud.
	Upstream string `json:"upstream"`
	Live     bool   `json:"live"`
	Address  string `json:"address,omitempty"` // where peers reach this hub
	// Peers are the hubs of the pool whose address is known.
	Peers []Peer `json:"peers,omitempty"`
}

// Values of Sharing.
const (
	RoleLeader = "leader"
	RoleMember = "member"
	Cloud      = "cloud"
)

// Peer is another hub of the pool.
type Peer struct {
	Node    string    `json:"node"`
	Address string    `json:"address"`
	Leader  bool      `json:"leader,omitempty"`
	Link    bool      `json:"link"`          // its link is up, as it or another peer said just now
	Live    bool      `json:"live"`          // it hears the cloud, by itself or through others
	Seen    time.Time `json:"seen,omitzero"` // when it last called or answered
}

// Vouching is who speaks for nodes that have no link.
type Vouching struct {
	By  string   `json:"by,omitempty"`  // the peer that last took this node's heartbeat
	For []string `json:"for,omitempty"` // nodes whose heartbeats this hub carries
}

// Ending is a pod that the cloud ended and that goes on until its turn.
type Ending struct {
	Pod       string    `json:"pod"` // namespace/name
	Why       string    `json:"why"`
	Since     time.Time `json:"since"`     // when the hub heard of it
	Due       time.Time `json:"due"`       // about when it stops
	Announced bool      `json:"announced"` // the pod has an event that says so
}

// Cut is one time without the cloud.
type Cut struct {
	From time.Time `json:"from"`
	To   time.Time `json:"to,omitzero"` // zero: it lasts
	How  string    `json:"how"`         // a reason of the condition of the link
}

// Journal is what waits for the cloud, and what became of earlier writes.
type Journal struct {
	Bytes  int       `json:"bytes"`
	Oldest time.Time `json:"oldest,omitzero"` // when the oldest that waits was made
	// Delivered and Dropped count since the start of the hub.
	Delivered int `json:"delivered"`
	Dropped   int `json:"dropped"`
}

// Certificate is one of those that the hub holds.
type Certificate struct {
	Name      string    `json:"name"`
	NotBefore time.Time `json:"notBefore,omitzero"` // zero: there is none
	NotAfter  time.Time `json:"notAfter,omitzero"`
	Issuer    string    `json:"issuer,omitempty"`
	// Problem is what is in the way of a new one, and Hint what helps.
	Problem string `json:"problem,omitempty"`
	Hint    string `json:"hint,omitempty"`
}

// Clock is the hub's notion of time beside the machine's. Known says that the
// cloud was heard since the start.
type Clock struct {
	Now          time.Time `json:"now"`
	Machine      time.Time `json:"machine"`
	Known        bool      `json:"known"`
	AheadSeconds float64   `json:"aheadSeconds"` // of the machine's; 0 within a minute
}

// Condition is one fact about the hub. True is good, for all of them.
type Condition struct {
	Type    string    `json:"type"`
	Status  string    `json:"status"` // True, False or Unknown
	Reason  string    `json:"reason"`
	Message string    `json:"message"` // what is wrong, and what helps
	Since   time.Time `json:"since,omitzero"`
}

// Values of Condition.Status.
const (
	True    = "True"
	False   = "False"
	Unknown = "Unknown"
)

// Scope is one slice of the cluster that the hub holds.
type Scope struct {
	Scope    string    `json:"scope"`
	Objects  int       `json:"objects"`
	Version  uint64    `json:"version"`
	Synced   bool      `json:"synced"`
	Stored   bool      `json:"stored"` // all of it would survive a power cut now
	Watchers int       `json:"watchers"`
	Contact  time.Time `json:"contact"` // when the cloud last proved it current
	Damage   string    `json:"damage,omitempty"`
}

// Healthy reports whether nothing asks for a person.
func (r *Report) Healthy() bool {
	for _, c := range r.Conditions {
		if c.Status != True {
			return false
		}
	}
	return true
}
