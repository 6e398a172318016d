package filter

import (
	"encoding/json"
	"fmt"
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/yurt-edge/yurt/internal/accessfilter"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// State is what filters go by. It is immutable; parts that did not change are
// the same in the next.
type State struct {
	// Version is the newest resource version of what the state was made of.
	Version  uint64
	Hub      *Hub       // nil: pods cannot reach the hub, or not trust it
	Place    *Place     // nil: not known yet
	Services *Services  // nil: not known yet
	Programs []*Program // in order
}

// Saw notes the resource version of something that the state is made of.
func (s *State) Saw(version string) {
	if v, err := strconv.ParseUint(version, 10, 64); err == nil {
		s.Version = max(s.Version, v)
	}
}

// Hub is where pods of this node reach the hub.
type Hub struct {
	Host string
	Port int32
	// Behind is set if pods that use the cluster address of default/kubernetes
	// may find the hub behind it: its certificate names that address.
	Behind bool
}

// Place is where the node stands.
type Place struct {
	Node string
	Pool string // empty: in none
	// Nodes are those of the pool; nil while they are not known.
	Nodes map[string]struct{}
	// Labels are the node's.
	Labels map[string]string
}

func (p *Place) scene() *accessfilter.Place {
	if p == nil {
		return nil
	}
	return &accessfilter.Place{Node: p.Node, Labels: p.Labels, Pool: p.Pool, Nodes: p.Nodes}
}

// Services holds what the annotations of Services ask for.
type Services struct {
	// Topology is the value of openyurt.io/topologyKeys, by namespace and
	// name, of the Services that have it.
	Topology map[string]string
}

// Annotation returns an annotation of an object; empty: it has none of that
// name, or an empty one.
func (o Object) Annotation(name string) (string, error) {
	value, _, err := o.annotation(name)
	return value, err
}

func (o Object) annotation(name string) (value string, has bool, err error) {
	if o.Encoding != wire.Protobuf {
		var object struct {
			Metadata struct {
				Annotations map[string]string `json:"annotations"`
			} `json:"metadata"`
		}
		if err := json.Unmarshal(o.Data, &object); err != nil {
			return "", false, fmt.Errorf("read annotations: %w", err)
		}
		value, has = object.Metadata.Annotations[name]
		return value, has, nil
	}
	err = fields(o.Data, func(f field) error {
		if f.num != objectMetadata {
			return nil
		}
		return fields(f.value, func(f field) error {
			if f.num != metadataAnnotations {
				return nil
			}
			k, v, err := pair(f.value)
			if string(k) == name {
				value, has = string(v), true
			}
			return err
		})
	})
	return value, has, err
}

const (
	objectMetadata      protowire.Number = 1
	metadataName        protowire.Number = 1
	metadataNamespace   protowire.Number = 3
	metadataLabels      protowire.Number = 11
	metadataAnnotations protowire.Number = 12
)
